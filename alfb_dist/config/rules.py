"""Rules between settings. A rule yields one line per problem, with the key paths, the values and what to do.

A rule reads settings through `Settings`. If one of them is missing or invalid, the rule stops there, so that a
mistake is reported once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from alfb_dist.config.keys import DEEPSPEED_KEYS, DERIVED_KEYS, ZERO_KEYS
from alfb_dist.config.text import nearest, shown

KINDS = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "list": "a list",
    "table": "a table",
    "dict": "a table",
    "None": '"null"',
}


class UnsettledError(Exception):
    """Raised when a rule reads a setting that is missing or already reported."""


@dataclass(frozen=True)
class Settings:
    """The tables with their defaults, as rules read them.

    bad: dotted paths whose values are invalid. pretrained: config.json of `model.path`, if there is one.
    """

    tables: dict[str, Any]
    bad: frozenset[str] = frozenset()
    world_size: int | None = None
    pretrained: dict[str, Any] = field(default_factory=dict)

    def __call__(self, path: str) -> Any:
        table, _, key = path.partition(".")
        try:
            if table in self.bad or path in self.bad:
                raise UnsettledError(path)
            return self.tables[table][key] if key else self.tables[table]
        except (KeyError, TypeError):
            raise UnsettledError(path) from None


Rule = Callable[[Settings], Iterator[str]]


def problems(settings: Settings, rules: Iterable[Rule]) -> list[str]:
    """Return the problems that the rules find, one line each."""
    lines: list[str] = []
    for rule in rules:
        # Line by line, to keep the problems found before a rule reads a missing setting.
        with contextlib.suppress(UnsettledError):
            for line in rule(settings):
                lines.append(line)
    return lines


def is_kind(value: Any, kind: str) -> bool:
    """Return whether a value is of a kind named in config/keys.py. A bool is not a number; an int is also a float."""
    if isinstance(value, bool) or kind == "bool":
        return isinstance(value, bool) and kind == "bool"
    if kind == "float":
        return isinstance(value, int | float)
    return isinstance(value, {"int": int, "str": str, "table": dict}[kind])


def divisible(of: str, value: int, by: str, divisor: int) -> Iterator[str]:
    """Yield a problem, with the nearest valid values, if `divisor` does not divide `value`."""
    if value % divisor:
        below, above = value - value % divisor, value - value % divisor + divisor
        advice = f"take {below} or {above}" if below else f"take {above}"
        yield f"{of} must be divisible by {by}: {advice}"


def unknown_key(path: str, key: str, names: list[str], fault: str) -> str:
    """Return the problem of an unknown key: the closest of `names`, or all of them.

    fault: such as "unknown key in [train]".
    """
    near = nearest(key, names)
    parent = path.removesuffix(key)
    return f"{path}: {fault}; " + (f"did you mean {parent}{near}?" if near else f"known keys: {', '.join(names)}")


def world(settings: Settings) -> Iterator[str]:
    ep_degree, size = settings("parallel.ep_degree"), settings.world_size
    if size is not None:
        yield from divisible(f"the number of ranks ({size})", size, f"parallel.ep_degree ({ep_degree})", ep_degree)


def max_rows(settings: Settings) -> Iterator[str]:
    rows, ep_degree = settings("parallel.max_rows"), settings("parallel.ep_degree")
    if 0 < rows < ep_degree:
        yield f"parallel.max_rows ({rows}) must be 0 or at least parallel.ep_degree ({ep_degree})"


def batch(settings: Settings) -> Iterator[str]:
    """The global batch must split evenly over the ranks, or over one expert group if their number is unknown."""
    total, micro = settings("train.global_batch"), settings("train.micro_batch")
    if settings.world_size is not None:
        ranks, label = settings.world_size, f"the number of ranks ({settings.world_size})"
    else:
        ranks = settings("parallel.ep_degree")
        label = f"parallel.ep_degree ({ranks})"
    by = f"train.micro_batch ({micro}) x {label} = {micro * ranks}"
    yield from divisible(f"train.global_batch ({total})", total, by, micro * ranks)


def balance_schedule(settings: Settings) -> Iterator[str]:
    zero_at, warmup = settings("balance.zero_at_step"), settings("balance.warmup_steps")
    if zero_at is not None and zero_at <= warmup:
        yield f"balance.zero_at_step ({zero_at}) must be greater than balance.warmup_steps ({warmup})"


def lr_schedule(settings: Settings) -> Iterator[str]:
    warmup, steps = settings("optimizer.warmup_steps"), settings("train.steps")
    if warmup > steps:
        yield f"optimizer.warmup_steps ({warmup}) must be at most train.steps ({steps})"


def deepspeed_keys(settings: Settings) -> Iterator[str]:
    for key, value in settings("deepspeed").items():
        path = f"deepspeed.{key}"
        if key in DERIVED_KEYS:
            yield f"{path} ({shown(value)}) is derived: remove it and set {DERIVED_KEYS[key]}"
        elif key not in DEEPSPEED_KEYS:
            yield unknown_key(path, key, sorted(DEEPSPEED_KEYS), "unknown key of DeepSpeed")
        elif not is_kind(value, DEEPSPEED_KEYS[key]):
            yield f"{path} ({shown(value)}) must be {KINDS[DEEPSPEED_KEYS[key]]}"


def deepspeed_zero(settings: Settings) -> Iterator[str]:
    zero = settings("deepspeed").get("zero_optimization")
    for key, value in zero.items() if isinstance(zero, dict) else ():
        path = f"deepspeed.zero_optimization.{key}"
        if key not in ZERO_KEYS:
            yield unknown_key(path, key, sorted(ZERO_KEYS), "unknown key of DeepSpeed")
        elif key == "stage" and value == 3 and is_kind(value, "int"):
            yield (
                f"{path} (3) must be 0, 1 or 2: ZeRO-3 partitions expert parameters that expert parallelism already "
                "shards; use stage 1 or 2"
            )
        elif key == "stage" and not (is_kind(value, "int") and 0 <= value <= 2):
            yield f"{path} ({shown(value)}) must be 0, 1 or 2"
        elif ZERO_KEYS[key] == "int" and value is not None and not _is_whole(value):
            yield f"{path} ({shown(value)}) must be a whole number of at least 0"
        elif value is not None and ZERO_KEYS[key] != "int" and not is_kind(value, ZERO_KEYS[key]):
            yield f"{path} ({shown(value)}) must be {KINDS[ZERO_KEYS[key]]}"


def _is_whole(value: Any) -> bool:
    """Return whether DeepSpeed accepts the value as a size; 5e8 is one."""
    return (is_kind(value, "int") or (is_kind(value, "float") and value.is_integer())) and value >= 0


TABLE_RULES: tuple[Rule, ...] = (
    world,
    max_rows,
    batch,
    balance_schedule,
    lr_schedule,
    deepspeed_keys,
    deepspeed_zero,
)
