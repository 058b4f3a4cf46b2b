"""Starts the ranks of a benchmark and collects their figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alfb_dist.bench.sizes import Case


def threads_per_rank(ranks: int) -> int:
    """Return the cores of this machine divided by `ranks`, or OMP_NUM_THREADS if that is set."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // ranks))


def measure(
    cases: Sequence[Case], seconds: float, show: Callable[[str], None], *, with_memory: bool = True
) -> list[dict[str, Any]]:
    """Return the figures of each case, in order; cases of one number of ranks share their processes.

    seconds: time for each case. show: called with a line of progress. Raises RuntimeError if a rank fails.
    """
    figures: dict[Case, dict[str, Any]] = {}
    for ranks in dict.fromkeys(case.ranks for case in cases):
        group = [case for case in cases if case.ranks == ranks]
        show(f"{len(group)} case(s) on {ranks} rank(s), {threads_per_rank(ranks)} thread(s) each")
        figures |= zip(group, _run_ranks(group, ranks, {"seconds": seconds, "with_memory": with_memory}))
    return [figures[case] for case in cases]


def run_command(command: Sequence[str], what: str, environment: dict[str, str] | None = None) -> None:
    """Run the command to its end. Raises RuntimeError with the end of its error output if it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n{done.stderr[-4000:]}")


def _run_ranks(cases: Sequence[Case], ranks: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        job, out = Path(directory, "job.json"), Path(directory, "out.jsonl")
        job.write_text(json.dumps({"cases": [asdict(c) for c in cases], "out": str(out), **options}))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads_per_rank(ranks))}
        environment.setdefault("PYTHONWARNINGS", "ignore")
        command = [sys.executable, *launcher, "-m", "alfb_dist.bench.worker", str(job)]
        run_command(command, "the benchmark's ranks", environment)
        return [json.loads(line) for line in out.read_text().splitlines()]
