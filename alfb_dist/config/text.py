"""Configuration as text: read a TOML file, apply `--set a.b=c`, write a configuration as TOML.

TOML has no null, so the string "null" stands for it: it is read as None, and None is written as "null".
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_NULL = "null"


class ConfigError(ValueError):
    """An invalid configuration. `problems` has one line for each mistake; the message is these lines."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


def refuse(problems: Sequence[str]) -> None:
    """Raise ConfigError with these lines, if there are any."""
    if problems:
        raise ConfigError(*problems)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the closest match to `name` in `names`, or None."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return matches[0] if matches else None


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises ConfigError with the path, and the line of a syntax error, if the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        near = nearest(path.name, (p.name for p in path.parent.glob("*.toml")))
        hint = f"; did you mean {path.parent / near}?" if near else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8 text (byte {content[error.start]:#04x})") from None
    try:
        return _read_nulls(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        place = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error))
        if place:
            raise ConfigError(f"{path}, line {place[2]}, column {place[3]}: {place[1]}") from None
        # At the end of the file tomllib gives no line number.
        raise ConfigError(f"{path}, line {text.count(chr(10)) + 1}: {error}") from None


def apply_overrides(tables: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set each `a.b=value` in `tables`, creating tables as needed; return one problem per malformed override.

    A value that is not valid TOML is taken as a string. Whether a key is known is checked later.
    """
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        *parents, key = (part.strip() for part in path.split("."))
        if not equals or not key or not all(parents):
            problems.append(f"--set {override}: expected table.key=value")
            continue
        table = tables
        for parent in parents:
            child = table.get(parent)
            if not isinstance(child, dict):
                child = table[parent] = {}
            table = child
        table[key] = _read_value(text.strip())
    return problems


def to_toml(tables: dict[str, Any], name: str = "") -> str:
    """Return nested tables of plain values as TOML text that reads back equal."""
    plain = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    lines = [f"[{name}]"] if name and (plain or not tables) else []
    lines += [f"{_key(key)} = {to_value(value)}" for key, value in plain.items()]
    blocks = ["\n".join(lines)] if lines else []
    for key, value in tables.items():
        if isinstance(value, dict):
            blocks.append(to_toml(value, f"{name}.{_key(key)}" if name else _key(key)).rstrip("\n"))
    return "\n\n".join(blocks) + "\n"


def to_value(value: Any) -> str:
    """Return a plain value as TOML writes it."""
    if value is None:
        return f'"{_NULL}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {to_value(child)}" for key, child in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(to_value(child) for child in value) + "]"
    return repr(value)


def shown(value: Any) -> str:
    """Return a value as TOML, shortened to fit in an error message."""
    text = to_value(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}"


def _read_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    # Text of several lines can define further keys; it is then a string, not a value.
    return _read_nulls(parsed["value"] if list(parsed) == ["value"] else text)


def _read_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _read_nulls(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_read_nulls(child) for child in value]
    return None if value == _NULL else value


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else to_value(key)
