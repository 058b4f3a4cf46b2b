"""What the result of a run depends on besides its settings: versions, this package's sources and their commit."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

RESULT = ("python", "alfb_dist", "torch", "deepspeed", "transformers", "numpy", "safetensors", "wandb")
SAVE = ("alfb_dist", "torch", "deepspeed", "transformers")
"""What the result of a run depends on, and what the content of its saves does."""

_SOURCES = (".py", ".c", ".h")


def versions(of: Sequence[str] = RESULT) -> dict[str, str]:
    """Return the versions of Python and of the packages named, without those that are not installed."""
    found = {}
    for name in of:
        try:
            found[name] = platform.python_version() if name == "python" else metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of this package's sources, with -dirty if files differ; None if git does not track them."""
    here = Path(__file__).parent
    try:
        tracked = ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(tracked, capture_output=True, timeout=10, check=True)
        describe = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def facts() -> dict[str, str]:
    """Return the versions and a hash of this package's sources, which all ranks of a run must share."""
    digest = xxhash.xxh3_128()
    package = Path(__file__).parents[1]
    for path in sorted(p for p in package.rglob("*") if p.suffix in _SOURCES):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return {**versions(), "hash of alfb_dist's files": digest.hexdigest()[:12]}


def differences(facts_by_place: Sequence[tuple[str, Mapping[str, Any]]], fix: str) -> list[str]:
    """Return one line for each fact that differs: its values, the places that have each, and the fix.

    facts_by_place: (place, facts) of each rank or host, in order; a place may occur several times.
    """
    found = []
    for name in dict.fromkeys(name for _, known in facts_by_place for name in known):
        holders: dict[str, list[str]] = {}
        for place, known in facts_by_place:
            holders.setdefault(repr(known[name]) if name in known else "missing", []).append(place)
        if len(holders) > 1:
            values = (f"{value} on {', '.join(dict.fromkeys(places))}" for value, places in holders.items())
            found.append(f"{name} is {', but '.join(values)}; {fix}")
    return found
