"""The directory of a run: a new one for each run, found again to resume it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from alfb_dist.config import Config
from alfb_dist.config.provenance import git_commit, versions
from alfb_dist.config.publish import publish
from alfb_dist.report.facts import flatten


def new_run_folder(parent: Path, name: str) -> Path:
    """Make and return a new directory: parent/name, or parent/name-2, -3, ... if that exists."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def last_run_folder(parent: Path, name: str) -> Path | None:
    """Return the directory that `new_run_folder` made last for this name, or None."""
    numbered = re.compile(re.escape(name) + r"(?:-(\d+))?")
    found = [(int(m[1] or 1), f) for f in parent.glob(f"{name}*") if (m := numbered.fullmatch(f.name)) and f.is_dir()]
    return max(found)[1] if found else None


def describe_run(config: Config, **facts: Any) -> dict[str, Any]:
    """Return the content of config.json: the resolved configuration, its hash, versions, git commit and the facts."""
    return {
        "config": config.model_dump(mode="json"),
        "config_hash": config.hash(),
        "versions": versions(),
        "git_commit": git_commit(),
        **facts,
    }


def write_config(folder: Path, description: dict[str, Any]) -> None:
    """Write folder/config.json, whole or not at all."""
    with publish(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(description, indent=1) + "\n")


def changed_settings(folder: Path, config: Config) -> list[str]:
    """Return one line for each setting that differs from the run's last start."""
    try:
        before = json.loads((folder / "config.json").read_text())["config"]
    except (OSError, ValueError, KeyError):
        return [f"{folder / 'config.json'} cannot be read: settings may have changed"]
    old, new = dict(flatten(before)), flat_settings(config)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and key != "run.resume"]
    return [f"changed since the last start: {key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed]


def flat_settings(config: Config) -> dict[str, Any]:
    """Return the configuration as one table, with keys such as balance.rate."""
    return dict(flatten(config.model_dump(mode="json")))
