"""The configuration of a run: pydantic tables read from TOML, every problem named before any process starts.

Imports only pydantic and the standard library, so that a refusal takes a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from alfb_dist.config.deepspeed_json import SECTION, Merge, read_deepspeed_json
from alfb_dist.config.keys import family_keys
from alfb_dist.config.model_rules import MODEL_RULES
from alfb_dist.config.rules import TABLE_RULES, Settings, problems, unknown_key
from alfb_dist.config.text import ConfigError, apply_overrides, nearest, read_toml, shown, to_toml, to_value

__all__ = ["Config", "ConfigError", "config_to_toml", "describe_fields", "load_config"]

RULES = (*MODEL_RULES, *TABLE_RULES)

Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], Field(strict=False)]  # not strict: TOML has lists, no tuples
Beta = Annotated[float, Field(ge=0, lt=1)]


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class RunConfig(_Table):
    """Where a run is kept, and how its processes start."""

    name: str = Field(
        default="run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="name of the run and its folder",
    )
    folder: Name = Field(default="runs", description="folder that holds the run folders")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="seed of weights, of the order of samples and of everything else"
    )
    resume: bool = Field(
        default=False, description="go on from the newest good checkpoint of the run; else a new run folder"
    )
    interface: str = Field(
        default="", description="network interface between hosts; empty: the one that leads to the first rank's host"
    )
    timeout_seconds: float = Field(default=600.0, gt=0, le=604_800, description="longest wait of every collective")


class ModelConfig(_Table):
    """The model: a transformers family with its configuration, or a folder with a pretrained one."""

    family: Name = Field(
        default="deepseek_v3", description="transformers model_type; with `path` that of the folder counts"
    )
    config: dict[str, JsonValue] = Field(
        default_factory=dict, description='arguments of the transformers configuration class; "null" for None'
    )
    path: str = Field(default="", description="folder of a pretrained transformers model, instead of `config`")
    attention: Literal["sdpa", "eager"] = Field(default="sdpa", description="attention implementation of transformers")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="precision of weights and activations")


class ParallelConfig(_Table):
    """How ranks share the model."""

    ep_degree: int = Field(
        default=1, ge=1, description="ranks that share the experts of a layer; divides ranks and experts"
    )
    expert_placement: Literal["prefer-node", "node", "any"] = Field(
        default="prefer-node",
        description='experts of a group that fit on one host but are not: told, refused ("node"), or not looked at',
    )
    max_rows: int = Field(
        default=0,
        ge=0,
        description="rows that a rank's experts hold at once, more being computed in pieces, twice; 0: all at once",
    )


class BalanceConfig(_Table):
    """How the routing bias follows the load (arXiv:2408.15664), and the losses to compare with."""

    rule: Literal["sign", "proportional", "rms"] = Field(default="sign", description="update rule of the bias")
    rate: float = Field(default=0.001, ge=0, le=1, description="score units per optimizer step; 0 freezes the bias")
    centered: bool = Field(default=False, description="take the mean out of every update")
    mode: Literal["auto", "train", "freeze", "recentre"] = Field(
        default="auto",
        description='what happens to the biases; recentre: the mean is taken out once; "auto": freeze with model.path',
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps in which the rate rises linearly from 0")
    zero_at_step: int | None = Field(default=None, ge=1, description="step from which on the rate is 0")
    sequence_loss_alpha: float = Field(
        default=0.0, ge=0, le=1, description="weight of DeepSeek-V3's sequence-wise loss"
    )
    batch_loss_alpha: float = Field(default=0.0, ge=0, le=1, description="weight of the classical auxiliary loss")


class OptimizerConfig(_Table):
    """AdamW and the schedule of its learning rate."""

    lr: float = Field(gt=0, le=10, description="peak learning rate")
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field(
        default=(0.9, 0.95), description="decay of both moments"
    )
    eps: float = Field(default=1e-8, gt=0, le=1, description="added to the root of the second moment")
    weight_decay: float = Field(default=0.1, ge=0, le=10, description="decoupled weight decay")
    clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0 for no limit")
    warmup_steps: int = Field(default=0, ge=0, description="steps in which the learning rate rises linearly")
    schedule: Literal["constant", "cosine"] = Field(
        default="cosine", description="course of the learning rate after that"
    )
    min_lr_ratio: float = Field(
        default=0.1, ge=0, le=1, description="last learning rate as a part of the peak (cosine)"
    )


class DataConfig(_Table):
    """The text, its tokens and the sequences cut from it."""

    source: Names = Field(
        min_length=1, description='folders, text files or token files; "python-stdlib": Python\'s own sources'
    )
    tokenizer: Name = Field(
        default="bytes", description='"bytes", a tokenizer.json, or a transformers tokenizer folder'
    )
    end_token: str = Field(
        default="", description="the tokenizer's end-of-document token, where it is not one of the usual ones"
    )
    sequence_length: int = Field(ge=2, le=2**24, description="tokens a sequence")
    layout: Literal["packed", "padded"] = Field(
        default="packed", description="documents joined, or one padded one a sequence"
    )
    validation_fraction: float = Field(default=0.05, gt=0, lt=1, description="part of the files kept for validation")
    validation_source: Names = Field(default=(), description="validation text; empty: split off `source`")
    cache: Name = Field(default="data-cache", description="folder of prepared token files")


class TrainConfig(_Table):
    """Steps, batches, evaluations and checkpoints."""

    steps: int = Field(ge=1, description="optimizer steps of the run")
    global_batch: int = Field(ge=1, description="sequences per optimizer step over all ranks")
    micro_batch: int = Field(ge=1, description="sequences per rank and forward pass")
    activation_checkpointing: Literal["none", "reentrant", "non-reentrant"] = Field(
        default="none", description="recompute each layer in backward instead of keeping its activations"
    )
    eval_interval: int = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_sequences: int = Field(default=64, ge=1, description="sequences of one evaluation over all ranks")
    checkpoint_interval: int = Field(default=0, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = Field(default=2, ge=1, description="newest checkpoints that are kept")
    max_skipped_steps: int = Field(default=20, ge=1, description="skipped steps in a row that end the run")


class ReportConfig(_Table):
    """What a run tells, where and how often."""

    log_interval: int = Field(default=1, ge=1, description="steps between lines of metrics")
    progress: bool = Field(default=True, description="a progress bar on the console")
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        default="auto", description='"auto": online if an account is configured, else offline'
    )
    wandb_project: Name = Field(default="alfb_dist", max_length=128, description="project on Weights & Biases")
    html: bool = Field(default=True, description="write report.html at the end")


TABLES: dict[str, type[_Table]] = {
    "run": RunConfig,
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "balance": BalanceConfig,
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "report": ReportConfig,
}


class Config(_Table):
    """A whole run. Settings that contradict each other are refused together with those that are wrong alone."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    balance: BalanceConfig = BalanceConfig()
    optimizer: OptimizerConfig
    data: DataConfig
    train: TrainConfig
    report: ReportConfig = ReportConfig()
    deepspeed: dict[str, JsonValue] = Field(
        default_factory=dict, description="handed to DeepSpeed as it is, apart from what the other tables decide"
    )

    @model_validator(mode="after")
    def _holds_together(self) -> Config:
        if found := problems(Settings(self.model_dump()), RULES):
            raise ConfigError(*found)
        return self

    def gradient_accumulation(self, world_size: int) -> int:
        """Return the micro-batches per optimizer step and rank. Raises ConfigError if the batch does not split."""
        _refuse(problems(Settings(self.model_dump(), world_size=world_size), RULES))
        return self.train.global_batch // (self.train.micro_batch * world_size)

    def hash(self) -> str:
        """Return 16 hexadecimal digits that stay the same as long as every setting but `run.resume` does."""
        text = json.dumps(self.model_dump(mode="json", exclude={"run": {"resume"}}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_config(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    deepspeed_json: Path | None = None,
) -> Config:
    """Return the configuration in a TOML file, changed by `table.key=value` overrides.

    world_size: number of ranks, where it is known; the sizes that have to divide it are then checked too.
    deepspeed_json: a DeepSpeed configuration file that is merged into it, by the rule in deepspeed_json.py.
    Raises ConfigError with one line per problem.
    """
    tables = read_toml(Path(path))
    found = apply_overrides(tables, overrides)
    merge = Merge(tables, str(deepspeed_json), _section_keys())
    if deepspeed_json is not None:
        merge.merge(read_deepspeed_json(deepspeed_json), world_size)
        found += merge.problems
    bad: set[str] = set()
    config = None
    try:
        config = Config.model_validate(tables)
    except ValidationError as error:
        details = _deepest(error.errors(include_url=False))
        found += [_explain(detail, _family(tables)) for detail in details]
        bad = {".".join(str(part) for part in detail["loc"][:2]) for detail in details}
        bad |= {str(detail["loc"][0]) for detail in details if detail["loc"][0] == "deepspeed"}
    resolved = _with_defaults(tables)
    pretrained, unreadable = _read_pretrained(resolved)
    found += unreadable
    found += problems(Settings(resolved, frozenset(bad), world_size, pretrained), RULES)
    _refuse([merge.explain(problem) for problem in found])
    assert config is not None, "a configuration that pydantic refused has a problem to show"
    return config


def _section_keys() -> dict[str, str]:
    """The keys that DeepSpeed's file may hold in its section for us, and where ours are."""
    tables: tuple[tuple[str, type[_Table]], ...] = (("parallel", ParallelConfig), ("balance", BalanceConfig))
    return {key: f"{name}.{key}" for name, model in tables for key in model.model_fields}


def read_section(values: dict[str, Any]) -> dict[str, Any]:
    """The section `alf_lb` of a DeepSpeed configuration, checked, without defaults. ConfigError if a key is wrong."""
    tables: dict[str, Any] = {}
    merge = Merge(tables, "the configuration", _section_keys())
    merge.merge({SECTION: values}, None)
    found = list(merge.problems)
    for name, model in (("parallel", ParallelConfig), ("balance", BalanceConfig)):
        try:
            model.model_validate(tables.get(name, {}))
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                found.append(_explain({**detail, "loc": (name, *detail["loc"])}, ""))
    _refuse([merge.explain(problem) for problem in found])
    return {key: value for name in ("parallel", "balance") for key, value in tables.get(name, {}).items()}


def config_to_toml(config: Config) -> str:
    """Return the configuration with every default written out, as TOML that `load_config` reads back equal."""
    return to_toml(config.model_dump())


def describe_fields() -> str:
    """Return a Markdown table of every key: type, default, bounds and meaning."""
    rows = ["| key | type | default | bounds | meaning |", "|---|---|---|---|---|"]
    for table, model in TABLES.items():
        for key, field in model.model_fields.items():
            default = "" if field.is_required() else to_value(field.get_default(call_default_factory=True))
            cells = (f"{table}.{key}", _kind(field), default or "required", _bounds(field), str(field.description))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    rows.append(f"| deepspeed | table | {{}} | | {Config.model_fields['deepspeed'].description} |")
    return "\n".join(rows) + "\n"


def _kind(field: FieldInfo) -> str:
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return " or ".join(to_value(choice) for choice in get_args(annotation))
    if get_origin(annotation) is UnionType:
        return " or ".join("null" if kind is type(None) else kind.__name__ for kind in get_args(annotation))
    name = getattr(get_origin(annotation) or annotation, "__name__", str(annotation))
    return {"tuple": "list", "dict": "table"}.get(name, name)


def _bounds(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "length >=", "max_length": "length <="}
    bounds = [(signs[name], getattr(rule, name)) for rule in field.metadata for name in signs if hasattr(rule, name)]
    return ", ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)


def _refuse(found: Sequence[str]) -> None:
    if found:
        raise ConfigError(*found)


def _with_defaults(tables: dict[str, Any]) -> dict[str, Any]:
    """Return the tables completed by defaults, without validation; what is no table is left as it is."""
    resolved: dict[str, Any] = {"deepspeed": {}, **tables}
    for name, model in TABLES.items():
        given = tables.get(name, {})
        if isinstance(given, dict):
            fields = {key: field for key, field in model.model_fields.items() if not field.is_required()}
            resolved[name] = {
                key: field.get_default(call_default_factory=True) for key, field in fields.items()
            } | given
    return resolved


def _read_pretrained(tables: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return config.json of `model.path` (empty without a path), and what is wrong with it."""
    path = tables["model"].get("path") if isinstance(tables["model"], dict) else None
    if not isinstance(path, str) or not path:
        return {}, []
    file = Path(path) / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, [f"model.path ({to_value(path)}) must be a folder with a transformers config.json: {error}"]
    if not isinstance(values, dict):
        return {}, [f"model.path ({to_value(path)}): {file} holds no JSON object"]
    return values, []


def _deepest(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Drop what follows from an error further down, and the rules of the whole, which `load_config` asks itself."""
    inner = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
    return [detail for detail in details if detail["loc"] and detail["loc"] not in inner]


def _family(tables: dict[str, Any]) -> str:
    model = tables.get("model")
    family = model.get("family", "deepseek_v3") if isinstance(model, dict) else ""
    return family if isinstance(family, str) else ""


def _explain(detail: ErrorDetails, family: str) -> str:
    """Return one of pydantic's findings as a line: key path, value, rule and what to do."""
    loc, kind, value = detail["loc"], detail["type"], shown(detail["input"])
    path = _path(loc)
    model = TABLES.get(str(loc[0]))
    field = model.model_fields.get(str(loc[1])) if model and len(loc) > 1 else None
    if kind == "extra_forbidden":
        return _unknown_key(path, [str(part) for part in loc], family)
    if kind == "missing":
        return f"{path} is missing: " + (f"give the {field.description}" if field else f"add a table [{path}]")
    if kind in ("model_type", "dict_type"):
        return f"{path} ({value}) must be a table"
    if kind == "invalid-json-value":
        return f"{path} ({value}) must be a number, a string, true, false, a list or a table"
    rule = re.sub(r"^\w+ should ", "", detail["msg"]).replace("valid tuple", "list").replace(" after validation", "")
    choices = re.findall("'([^']*)'", detail["msg"]) if kind == "literal_error" else []
    near = nearest(str(detail["input"]), choices)
    hint = f"; did you mean {shown(near)}?" if near else f" ({field.description})" if field else ""
    return f"{path} ({value}) must {rule}{hint}"


def _path(loc: tuple[int | str, ...]) -> str:
    """Return a dotted key path. Inside a free table pydantic names a value's type after each key: leave those out."""
    for free in (("model", "config"), ("deepspeed",)):
        if loc[: len(free)] == free:
            loc = free + loc[len(free) :: 2]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _unknown_key(path: str, parts: list[str], family: str) -> str:
    *parents, key = parts
    names = list(TABLES[parents[0]].model_fields) if parents else list(Config.model_fields)
    elsewhere = [f"{table}.{key}" for table, model in TABLES.items() if key in model.model_fields]
    if (keys := family_keys(family)) and key in keys.names:
        elsewhere.append(f"model.config.{key}")
    if elsewhere:
        return f"{path} is no key; did you mean {' or '.join(elsewhere)}?"
    return unknown_key(path, key, names, f"of [{parents[0]}]" if parents else "of a configuration")
