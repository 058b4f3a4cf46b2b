"""The names of the folders in a run's `checkpoints/`.

`step-00000100` is a finished save, `step-00000100.tmp` one being written or removed, `step-00000100.old` one that a
newer save of the same step is taking the place of.
"""

from __future__ import annotations

import re
from pathlib import Path

_SAVE = re.compile(r"step-(\d{8,})(\.old)?")
_STALE = re.compile(r"step-\d{8,}\.tmp")


def step_folder(folder: Path, step: int) -> Path:
    """Where the save of a step lies."""
    return folder / f"step-{step:08d}"


def aside(path: Path) -> Path:
    """Where a save is written before it is finished, and put before it is removed."""
    return path.with_name(f"{path.name.removesuffix('.old')}.tmp")


def replaced(path: Path) -> Path:
    """Where a save waits while another of the same step takes its place."""
    return path.with_name(f"{path.name}.old")


def step_of(path: Path) -> int | None:
    """The step that a save's name says, or None if it is not the name of a save."""
    match = _SAVE.fullmatch(path.name)
    return int(match[1]) if match else None


def saves(folder: Path) -> list[Path]:
    """Every folder that may be a finished save, the newest first."""
    if not folder.is_dir():
        return []
    found = [(step, path.suffix != ".old", path) for path in folder.iterdir() if (step := step_of(path)) is not None]
    return [path for *_, path in sorted(found, reverse=True) if path.is_dir()]


def stale(folder: Path) -> list[Path]:
    """What saves and removals that did not finish have left."""
    return [path for path in folder.iterdir() if _STALE.fullmatch(path.name)] if folder.is_dir() else []
