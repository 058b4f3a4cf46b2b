"""Starts the ranks of a benchmark and collects what they measured."""

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


def threads_a_rank(ranks: int) -> int:
    """The cores of this machine, shared evenly; OMP_NUM_THREADS if that is set."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // ranks))


def measure(
    cases: Sequence[Case], seconds: float, tell: Callable[[str], None], *, with_memory: bool = True
) -> list[dict[str, Any]]:
    """The figures of each case, in order; a world of its own for each number of ranks. RuntimeError if one fails."""
    figures: dict[Case, dict[str, Any]] = {}
    for ranks in dict.fromkeys(case.ranks for case in cases):
        mine = [case for case in cases if case.ranks == ranks]
        tell(f"{len(mine)} case(s) on {ranks} rank(s), {threads_a_rank(ranks)} thread(s) each")
        figures |= zip(mine, _run_world(mine, ranks, {"seconds": seconds, "with_memory": with_memory}))
    return [figures[case] for case in cases]


def _run_world(cases: Sequence[Case], ranks: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder, "job.json"), Path(folder, "out.jsonl")
        job.write_text(json.dumps({"cases": [asdict(c) for c in cases], "out": str(out), **options}))
        world = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads_a_rank(ranks))}
        environment.setdefault("PYTHONWARNINGS", "ignore")
        command = [sys.executable, *world, "-m", "alfb_dist.bench.worker", str(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the benchmark's ranks failed:\n{done.stderr[-4000:]}")
        return [json.loads(line) for line in out.read_text().splitlines()]
