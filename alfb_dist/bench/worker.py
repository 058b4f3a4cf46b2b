"""A rank of a benchmark, `python -m alfb_dist.bench.worker JOB`. JOB is a JSON file."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alfb_dist.bench import memory
from alfb_dist.bench.contestants import OURS, THEIRS, Run, build, make_run, make_tokens, make_weights, products
from alfb_dist.bench.sizes import FLOOR, Case
from alfb_dist.bench.timing import summary, time_in_turn, time_once
from alfb_dist.distributed.collectives import all_max, group_rank, world_group
from alfb_dist.distributed.topology import init_distributed, leave

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}
"""Largest difference of output and of the tokens' gradient from transformers' eager block, as a share of the norm."""

SLOW_SECONDS = 5.0
"""A contestant is run only once if its first forward and backward take longer, and longer than a case's time."""


def _first_pass(run: Run, x: Tensor, device: torch.device) -> tuple[float, list[Tensor]]:
    """Return (seconds on the slowest rank, [output, gradient]) of a first forward and backward; collective."""
    kept: list[Tensor] = []

    def backward(out: Tensor) -> None:
        run.backward(out)
        kept.append(out.detach().clone())

    seconds = time_once(Run(run.forward, backward), world_group(), device)
    assert x.grad is not None
    return seconds, [kept[0], x.grad.clone()]


def _difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference on any rank, as a share of the norm; collective."""
    shares = [float((a - b).double().norm() / b.double().norm()) for a, b in zip(got, expected)]
    return float(all_max(torch.tensor(shares, dtype=torch.float64, device=got[0].device), world_group()).max())


def _memory(run: Run, block: nn.Module, rows: int, device: torch.device) -> dict[str, float]:
    """Return the most that any rank keeps, and has allocated; collective."""
    found = torch.tensor([memory.kept_bytes(run, block.parameters()), memory.peak_bytes(run)], device=device)
    kept, peak = all_max(found, world_group()).tolist()
    return {"kept_bytes_per_row": kept / rows, "peak_bytes": peak}


def measure(case: Case, seconds: float, device: torch.device, *, with_memory: bool = True) -> dict[str, Any]:
    """Return the case's figures by contestant; collective. Raises RuntimeError if the contestants' results differ."""
    group = world_group()
    weights = make_weights(case)
    options: Any = {"device": device, "dtype": getattr(torch, case.dtype)}
    x = make_tokens(case, weights, group_rank(group)).to(**options).requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(**options)
    blocks = {name: build(name, case, weights, device) for name in (*THEIRS, OURS)}
    runs = {name: make_run(block, x, grad) for name, block in blocks.items()}
    first = {name: _first_pass(run, x, device) for name, run in runs.items()}
    slow = [name for name, (elapsed, _) in first.items() if elapsed > max(seconds, SLOW_SECONDS)]
    expected, found = first["transformers eager"][1], {FLOOR: dict[str, Any]()}
    for name, block in blocks.items():
        difference = _difference(first[name][1], expected)
        if not difference <= TOLERANCE[case.dtype]:
            raise RuntimeError(f"{name} differs from transformers' eager block by {difference:.1e} of the norm")
        measured = with_memory and name not in slow
        found[name] = _memory(runs[name], block, case.rows, device) if measured else {}
        found[name]["difference"] = difference
    others = {name: run for name, run in runs.items() if name not in slow}
    times = time_in_turn({FLOOR: products(case, device), **others}, seconds, group, device)
    times |= {name: [first[name][0]] for name in slow}
    for name in (*runs, FLOOR):
        found[name] |= summary(times[name], times[FLOOR])
    return {"case": asdict(case), "threads": torch.get_num_threads(), "results": found}


def main(job_file: str) -> None:
    """Measure the job's cases; the first rank appends the figures of each to the file `out`, a line of JSON each."""
    job = json.loads(Path(job_file).read_text())
    device = init_distributed()
    for fields in job["cases"]:
        figures = measure(Case(**fields), job["seconds"], device, with_memory=job["with_memory"])
        gc.collect()
        if group_rank(world_group()) == 0:
            with Path(job["out"]).open("a") as file:
                file.write(json.dumps(figures) + "\n")
    leave(0)


if __name__ == "__main__":
    main(sys.argv[1])
