"""Runs on test hosts, and their comparison."""

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
    """Return the lines of a run's metrics, without the fields that depend on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _CLOCK} for line in lines]


def same_runs(one: Path, other: Path) -> list[str]:
    """Return a line for each difference between two runs' metrics, loads and biases; none if they are equal."""
    found = []
    for a, b in zip(first := metrics(one), second := metrics(other)):
        keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
        found += [f"step {a['step']}: {key} is {a.get(key)} and {b.get(key)}" for key in keys]
    if len(first) != len(second):
        found.append(f"{len(first)} and {len(second)} lines of metrics")
    if (one / "loads.bin").read_bytes() != (other / "loads.bin").read_bytes():
        found.append("loads.bin (loads and biases) differs")
    return found


def environment() -> dict[str, str]:
    """Return the environment of a new shell in which this Python's virtual environment is active."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DS_", "GLOO_", "PYTEST"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def launch(hosts: Hosts, folder: Path, name: str, *words: str, config: str = "test") -> list[str]:
    """Return the `alfb launch` command for a run of this name, and write the hostfile of the two hosts."""
    (folder / "hosts").write_text("".join(f"{host} slots=2\n" for host in hosts.names))
    command = [sys.executable, "-m", "alfb_dist.cli", "launch", str(ROOT / "configs" / f"{config}.toml")]
    return [*command, "--set", f"run.name='{name}'", *words]


def start(hosts: Hosts, folder: Path, command: list[str]) -> subprocess.Popen[str]:
    """Start the command on host1, its output appended to the file `output`."""
    with (folder / "output").open("a") as out:
        return hosts.popen("host1", command, cwd=folder, env=environment(), stdout=out, stderr=out)
