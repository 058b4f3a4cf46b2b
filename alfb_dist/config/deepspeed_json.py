"""A DeepSpeed configuration file, merged into the TOML file's tables.

Sizes, clipping, AdamW, its schedule and bf16 become settings of our tables. The section `alf_lb` has keys of [parallel]
and [balance]. Everything else goes into [deepspeed]. "auto" leaves a key to the TOML file or its default, and to
DeepSpeed's default where our tables have no such key. A key set in both files must have the same value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alfb_dist.config.rules import unknown_key
from alfb_dist.config.text import ConfigError, shown

AUTO = "auto"
SECTION = "alf_lb"

_SIZES = {
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "train_batch_size": "train.global_batch",
    "gradient_clipping": "optimizer.clip",
}
_ADAMW = {name: f"optimizer.{name}" for name in ("lr", "betas", "eps", "weight_decay")}
_ADAMW_KINDS = ("torch_adam", "adam_w_mode", "fused", "foreach")  # accepted: it is always torch's fused AdamW
_SCHEDULES = {"WarmupLR": "constant", "WarmupCosineLR": "cosine"}
_SCHEDULE = {
    "warmup_num_steps": "optimizer.warmup_steps",
    "total_num_steps": "train.steps",
    "cos_min_ratio": "optimizer.min_lr_ratio",
    "warmup_max_lr": "optimizer.lr",
}
_SCHEDULE_ONLY = {"warmup_min_lr": 0, "warmup_min_ratio": 0, "warmup_type": "linear"}  # as our schedule does


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, which may have comments. Raises ConfigError if it cannot be read."""
    import hjson  # here, since few runs need it

    try:
        values = hjson.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must contain a JSON object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(n for n in names if names.count(n) > 1)}")
    return found


@dataclass
class Merge:
    """Tables of a TOML file, into which a DeepSpeed file is merged. `problems` has one line for each conflict."""

    tables: dict[str, Any]
    file: str
    section_keys: dict[str, str]  # the keys of `alf_lb` and ours, such as rate: balance.rate
    problems: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)

    def merge(self, values: dict[str, Any], world_size: int | None) -> None:
        """Merge all values into the tables. world_size: number of ranks, if known, for the accumulation steps."""
        rest = dict(values)
        self._section(rest.pop(SECTION, {}))
        for key, path in _SIZES.items():
            self._put(path, rest.pop(key, AUTO), key)
        self._optimizer(rest.pop("optimizer", AUTO))
        self._scheduler(rest.pop("scheduler", AUTO))
        for key in ("bf16", "bfloat16", "fp16"):
            self._precision(key, rest.pop(key, AUTO))
        self._accumulation(rest.pop("gradient_accumulation_steps", AUTO), world_size)
        self._pass_on(rest)

    def explain(self, problem: str) -> str:
        """Return a problem with the key of the DeepSpeed file that its value comes from."""
        origin = self.origins.get(problem.partition(" ")[0])
        return f"{problem} (from {origin} in {self.file})" if origin else problem

    def _put(self, path: str, value: Any, key: str) -> None:
        name, _, setting = path.partition(".")
        table = self.tables.setdefault(name, {})
        if value == AUTO or not isinstance(table, dict):
            return
        if setting in table and table[setting] != value:
            self.problems.append(
                f"{path} ({shown(table[setting])}) and {key} ({shown(value)}) in {self.file} contradict each other: "
                f'remove one of them, or write "{AUTO}" into {self.file}'
            )
        elif setting not in table:
            table[setting], self.origins[path] = value, key

    def _table(self, key: str, value: Any, names: Iterable[str]) -> dict[str, Any]:
        """Return the entries with these names; report a value that is not a table, and other names."""
        if value == AUTO:
            return {}
        if not isinstance(value, dict):
            self.problems.append(f"{key} ({shown(value)}) in {self.file} must be a table")
            return {}
        known = list(names)
        for name in value.keys() - set(known):
            fault = "unknown key" if key == SECTION else "unsupported key"
            line = unknown_key(f"{key}.{name}", name, known, fault)
            self.problems.append(f"{line} ({self.file})")
        return {name: value[name] for name in known if name in value}

    def _section(self, value: Any) -> None:
        for name, setting in self._table(SECTION, value, self.section_keys).items():
            self._put(self.section_keys[name], setting, f"{SECTION}.{name}")

    def _optimizer(self, value: Any) -> None:
        table = self._table("optimizer", value, ("type", "params"))
        if table.get("type", AUTO) not in (AUTO, "Adam", "AdamW"):
            self.problems.append(f'optimizer.type ({shown(table["type"])}) in {self.file} must be "AdamW"')
        params = self._table("optimizer.params", table.get("params", AUTO), (*_ADAMW, *_ADAMW_KINDS))
        if params.get("adam_w_mode") is False:
            self.problems.append(f"optimizer.params.adam_w_mode (false) in {self.file} must be true: AdamW is used")
        for name, path in _ADAMW.items():
            self._put(path, params.get(name, AUTO), f"optimizer.params.{name}")

    def _scheduler(self, value: Any) -> None:
        table = self._table("scheduler", value, ("type", "params"))
        kind = table.get("type", AUTO)
        if kind != AUTO and kind not in _SCHEDULES:
            names = " or ".join(_SCHEDULES)
            self.problems.append(f"scheduler.type ({shown(kind)}) in {self.file} must be {names}")
        self._put("optimizer.schedule", _SCHEDULES.get(kind, AUTO), "scheduler.type")
        params = self._table("scheduler.params", table.get("params", AUTO), (*_SCHEDULE, *_SCHEDULE_ONLY))
        for name, path in _SCHEDULE.items():
            self._put(path, params.get(name, AUTO), f"scheduler.params.{name}")
        for name, only in _SCHEDULE_ONLY.items():
            if params.get(name, AUTO) not in (AUTO, only):
                path = f"scheduler.params.{name} ({shown(params[name])})"
                self.problems.append(f"{path} in {self.file} must be {shown(only)}: the warm-up is linear, from 0")

    def _precision(self, key: str, value: Any) -> None:
        enabled = AUTO
        if key == "fp16":  # its other keys tune loss scaling, which is not used
            enabled = value.get("enabled", AUTO) if isinstance(value, dict) else value
            if enabled not in (AUTO, False):
                self.problems.append(f"fp16 ({shown(value)}) in {self.file} must be disabled: use bf16 or float32")
            return
        enabled = self._table(key, value, ("enabled",)).get("enabled", AUTO)
        dtypes = {True: "bfloat16", False: "float32", AUTO: AUTO}
        if not isinstance(enabled, bool) and enabled != AUTO:
            self.problems.append(f'{key}.enabled ({shown(enabled)}) in {self.file} must be true, false or "{AUTO}"')
        else:
            self._put("model.dtype", dtypes[enabled], f"{key}.enabled")

    def _accumulation(self, steps: Any, world_size: int | None) -> None:
        """Set the global batch from the accumulation steps and the micro-batch, which is merged before.

        If the number of ranks is unknown, one expert group is assumed, and a global batch in the TOML file wins.
        """
        if steps == AUTO:
            return
        train, parallel = self.tables.get("train", {}), self.tables.get("parallel", {})
        micro = train.get("micro_batch") if isinstance(train, dict) else None
        ranks = world_size or (parallel.get("ep_degree", 1) if isinstance(parallel, dict) else 1)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            path = f"gradient_accumulation_steps ({shown(steps)})"
            self.problems.append(f"{path} in {self.file} must be a whole number of at least 1")
        elif isinstance(micro, int) and isinstance(ranks, int) and (world_size or "global_batch" not in train):
            key = f"gradient_accumulation_steps ({steps}) x train.micro_batch ({micro}) x {ranks} ranks"
            self._put("train.global_batch", steps * micro * ranks, key)

    def _pass_on(self, rest: dict[str, Any]) -> None:
        target = self.tables.setdefault("deepspeed", {})
        if isinstance(target, dict):
            self._join(target, rest, "deepspeed")

    def _join(self, target: dict[str, Any], values: dict[str, Any], path: str) -> None:
        for key, value in values.items():
            if value == AUTO:
                continue
            if isinstance(value, dict) and isinstance(target.get(key, {}), dict):
                self._join(target.setdefault(key, {}), value, f"{path}.{key}")
            elif key in target and target[key] != value:
                self.problems.append(
                    f"{path}.{key} ({shown(target[key])}) and the same key ({shown(value)}) in {self.file} contradict "
                    f'each other: remove one of them, or write "{AUTO}" into {self.file}'
                )
            else:
                target[key] = value
