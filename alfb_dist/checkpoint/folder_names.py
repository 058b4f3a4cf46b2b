"""The names of the directories in a run's `checkpoints/`.

`step-00000100` is a finished save, `step-00000100.tmp` one that is being written or removed, `step-00000100.old` one
that is being replaced by a newer save of the same step.
"""

from __future__ import annotations

import re
from pathlib import Path

_SAVE = re.compile(r"step-(\d{8,})(\.old)?")
_UNFINISHED = re.compile(r"step-\d{8,}\.tmp")


def step_folder(folder: Path, step: int) -> Path:
    """Return the directory of the save of a step."""
    return folder / f"step-{step:08d}"


def temporary(path: Path) -> Path:
    """Return where a save is written until it is finished, and moved before it is removed."""
    return path.with_name(f"{path.name.removesuffix('.old')}.tmp")


def replaced(path: Path) -> Path:
    """Return where a save is kept while another of the same step replaces it."""
    return path.with_name(f"{path.name}.old")


def step_of(path: Path) -> int | None:
    """Return the step in the name of a save; None for another name."""
    match = _SAVE.fullmatch(path.name)
    return int(match[1]) if match else None


def saves(folder: Path) -> list[Path]:
    """Return every directory that may be a finished save, the newest first."""
    if not folder.is_dir():
        return []
    found = [(step, path.suffix != ".old", path) for path in folder.iterdir() if (step := step_of(path)) is not None]
    return [path for *_, path in sorted(found, reverse=True) if path.is_dir()]


def unfinished(folder: Path) -> list[Path]:
    """Return what interrupted saves and removals have left."""
    return [path for path in folder.iterdir() if _UNFINISHED.fullmatch(path.name)] if folder.is_dir() else []
