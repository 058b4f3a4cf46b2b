"""The `checkpoints/` folder of a run: a save becomes visible in one step, the newest good one is found, old ones go."""

from __future__ import annotations

import contextlib
from pathlib import Path

from alfb_dist.checkpoint import files
from alfb_dist.checkpoint import manifest as manifests
from alfb_dist.checkpoint.folder_names import aside, replaced, saves, stale, step_folder
from alfb_dist.checkpoint.verification import size_problems, verify

__all__ = ["SaveError", "newest_good", "prune", "publish", "start", "step_folder"]

LATEST = "latest"


class SaveError(OSError):
    """A save did not succeed, on every rank alike. Training can go on; earlier saves are as they were."""


def start(path: Path) -> Path:
    """An empty folder in which the save that will be `path` can be written."""
    return files.start_folder(aside(path))


def publish(path: Path) -> None:
    """The save written beside `path` is there, on the disk; whenever this stops, it or what was there before is."""
    files.publish_folder(aside(path), path, replaced(path))
    with contextlib.suppress(OSError):  # only a hint
        files.replace(path.parent / LATEST, f"{path.name}\n".encode())


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest save that verifies, or None, and why each newer one does not. Reads every byte of what it tries."""
    skipped: list[str] = []
    for path in saves(folder):
        problems = verify(path)
        if not problems:
            return path, skipped
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        skipped.append(f"{path.name}: {problems[0]}{more}")
    return None, skipped


def _whole(path: Path) -> bool:
    try:
        return not size_problems(path, manifests.read(path))
    except ValueError:
        return False


def prune(folder: Path, keep: int, *, known_good: Path | None = None) -> list[Path]:
    """At most `keep` whole saves are left, the newest, and nothing unfinished; the saves that were removed.

    No save may be under way. Saves that are not whole stay, to be looked at. One of those kept has verified, or nothing
    is removed but the unfinished. known_good: a save that stays and need not be verified again, the one just made.
    Raises ValueError if keep < 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    for path in stale(folder):
        files.remove(path)
    whole = [path for path in saves(folder) if _whole(path)]
    if len(whole) <= keep or not any(path == known_good or not verify(path) for path in whole[:keep]):
        return []
    surplus = [path for path in whole[keep:] if path != known_good]
    for path in surplus:
        files.rename(path, aside(path))  # seen as unfinished from here on
        files.remove(aside(path))
    return surplus
