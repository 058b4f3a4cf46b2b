"""The `checkpoints/` directory of a run: publish a save in one step, find the newest good one, remove old ones."""

from __future__ import annotations

import contextlib
from pathlib import Path

from alfb_dist.checkpoint import files
from alfb_dist.checkpoint import manifest as manifests
from alfb_dist.checkpoint.folder_names import replaced, saves, step_folder, temporary, unfinished
from alfb_dist.checkpoint.verification import size_problems, verify

__all__ = ["SaveError", "newest_good", "prune", "publish", "start", "step_folder"]

LATEST = "latest"


class SaveError(OSError):
    """A save failed, on every rank alike. Training can go on; earlier saves are unchanged."""


def start(path: Path) -> Path:
    """Make an empty directory in which the save `path` can be written."""
    return files.start_folder(temporary(path))


def publish(path: Path) -> None:
    """Rename the temporary directory of a save to `path`. Whenever this stops, the old or the new save exists."""
    files.publish_folder(temporary(path), path, replaced(path))
    with contextlib.suppress(OSError):  # only a hint
        files.replace(path.parent / LATEST, f"{path.name}\n".encode())


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest save that verifies, or None, and why each newer one does not. Reads every byte of those."""
    skipped: list[str] = []
    for path in saves(folder):
        problems = verify(path)
        if not problems:
            return path, skipped
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        skipped.append(f"{path.name}: {problems[0]}{more}")
    return None, skipped


def _is_complete(path: Path) -> bool:
    try:
        return not size_problems(path, manifests.read(path))
    except ValueError:
        return False


def prune(folder: Path, keep: int, *, known_good: Path | None = None) -> list[Path]:
    """Remove unfinished saves and all complete ones but the newest `keep`; return the complete ones removed.

    Not to be called while a save is written. Damaged saves stay for inspection. No complete save is removed unless one
    of those kept verifies. known_good: the save just made, which is kept and not verified again.
    Raises ValueError if keep < 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    for path in unfinished(folder):
        files.remove(path)
    complete = [path for path in saves(folder) if _is_complete(path)]
    if len(complete) <= keep or not any(path == known_good or not verify(path) for path in complete[:keep]):
        return []
    surplus = [path for path in complete[keep:] if path != known_good]
    for path in surplus:
        files.rename(path, temporary(path))  # so that an interrupted removal counts as unfinished
        files.remove(temporary(path))
    return surplus
