"""Loading a configuration from files and overrides. All its problems are reported together, before a run starts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from alfb_dist.config.deepspeed_json import SECTION, Merge, read_deepspeed_json
from alfb_dist.config.keys import family_keys
from alfb_dist.config.rules import Settings, problems, unknown_key
from alfb_dist.config.tables import RULES, TABLES, BalanceConfig, Config, ParallelConfig, Table
from alfb_dist.config.text import apply_overrides, nearest, read_toml, refuse, shown, to_value


def load_config(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    deepspeed_json: Path | None = None,
) -> Config:
    """Return the configuration in a TOML file, with `table.key=value` overrides applied.

    world_size: number of ranks, if known; batch and parallel sizes are then checked against it.
    deepspeed_json: a DeepSpeed configuration file to merge in, see deepspeed_json.py.
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
    refuse([merge.explain(problem) for problem in found])
    assert config is not None, "pydantic refused the configuration, but no problem was found"
    return config


def _section_keys() -> dict[str, str]:
    """Return the keys of the section `alf_lb` of a DeepSpeed file, and our path of each."""
    tables: tuple[tuple[str, type[Table]], ...] = (("parallel", ParallelConfig), ("balance", BalanceConfig))
    return {key: f"{name}.{key}" for name, model in tables for key in model.model_fields}


def read_section(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in a section `alf_lb` of a DeepSpeed configuration. Raises ConfigError if one is invalid."""
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
    refuse([merge.explain(problem) for problem in found])
    return {key: value for name in ("parallel", "balance") for key, value in tables.get(name, {}).items()}


def _with_defaults(tables: dict[str, Any]) -> dict[str, Any]:
    """Return the tables with defaults filled in, not validated; a value in the place of a table is kept."""
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
    """Return config.json of `model.path`, empty without a path, and the problems with it."""
    path = tables["model"].get("path") if isinstance(tables["model"], dict) else None
    if not isinstance(path, str) or not path:
        return {}, []
    file = Path(path) / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, [f"model.path ({to_value(path)}) must be a directory with a transformers config.json: {error}"]
    if not isinstance(values, dict):
        return {}, [f"model.path ({to_value(path)}): {file} must contain a JSON object"]
    return values, []


def _deepest(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Drop errors that follow from a nested one, and those of the whole, which `load_config` finds itself."""
    inner = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
    return [detail for detail in details if detail["loc"] and detail["loc"] not in inner]


def _family(tables: dict[str, Any]) -> str:
    model = tables.get("model")
    family = model.get("family", "deepseek_v3") if isinstance(model, dict) else ""
    return family if isinstance(family, str) else ""


def _explain(detail: ErrorDetails, family: str) -> str:
    """Return one of pydantic's errors as a line: key path, value, rule and what to do."""
    loc, kind, value = detail["loc"], detail["type"], shown(detail["input"])
    path = _path(loc)
    model = TABLES.get(str(loc[0]))
    field = model.model_fields.get(str(loc[1])) if model and len(loc) > 1 else None
    if kind == "extra_forbidden":
        return _unknown_key(path, [str(part) for part in loc], family)
    if kind == "missing":
        return f"{path} is missing" + (f" ({field.description})" if field else f": add the table [{path}]")
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
    """Return a dotted key path, without the type names that pydantic puts after the keys of a free table."""
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
        return f"{path}: unknown key; did you mean {' or '.join(elsewhere)}?"
    return unknown_key(path, key, names, f"unknown key in [{parents[0]}]" if parents else "unknown key")
