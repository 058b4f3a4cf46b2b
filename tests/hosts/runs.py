"""Runs on test hosts, and what must be the same between two of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .cluster import Hosts

ROOT = Path(__file__).parents[2]
_CLOCK = ("step_seconds", "tokens_per_second")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _CLOCK} for line in lines]


def same_runs(one: Path, other: Path) -> list[str]:
    """What differs between two runs' metrics, loads and biases: one line each, none if they are equal to the bit."""
    found = []
    for a, b in zip(mine := metrics(one), theirs := metrics(other)):
        keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
        found += [f"step {a['step']}: {key} is {a.get(key)} and {b.get(key)}" for key in keys]
    if len(mine) != len(theirs):
        found.append(f"{len(mine)} and {len(theirs)} lines of metrics")
    if (one / "loads.bin").read_bytes() != (other / "loads.bin").read_bytes():
        found.append("loads.bin (loads and biases) differs")
    return found


def environment() -> dict[str, str]:
    """As in a fresh shell of a user who has activated the environment that this Python is of."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DS_", "GLOO_", "PYTEST"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def launch(hosts: Hosts, folder: Path, name: str, *words: str, config: str = "test") -> list[str]:
    """The words of `alfb launch` for a run of this name in the folder, with the two hosts' hostfile beside it."""
    (folder / "hosts").write_text("".join(f"{host} slots=2\n" for host in hosts.names))
    command = [sys.executable, "-m", "alfb_dist.cli", "launch", str(ROOT / "configs" / f"{config}.toml")]
    return [*command, "--set", f"run.name='{name}'", *words]


def start(hosts: Hosts, folder: Path, command: list[str]) -> subprocess.Popen[str]:
    """The command begins on host1; its output goes to the folder's `output`."""
    with (folder / "output").open("a") as out:
        return hosts.popen("host1", command, cwd=folder, env=environment(), stdout=out, stderr=out)
