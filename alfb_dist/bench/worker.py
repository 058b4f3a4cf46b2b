"""A rank of a benchmark: `python -m alfb_dist.bench.worker JOB`, one process a rank. JOB is a JSON file."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alfb_dist.bench import memory
from alfb_dist.bench.contestants import FLOOR, OURS, THEIRS, Run, build, make_tokens, make_weights, products, run_of
from alfb_dist.bench.sizes import Case
from alfb_dist.bench.timing import in_turn, summary
from alfb_dist.collectives import all_max, group_rank, world_group
from alfb_dist.topology import init_distributed, leave

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}
"""Largest difference of output and of the tokens' gradient from transformers' eager block, as a share of the norm."""


def _output_and_gradient(run: Run, x: Tensor) -> list[Tensor]:
    out = run.forward()
    run.backward(out)
    assert x.grad is not None
    return [out.detach().clone(), x.grad.clone()]


def _difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The larger of the differences on any rank; collective."""
    shares = [float((a - b).double().norm() / b.double().norm()) for a, b in zip(got, expected)]
    return float(all_max(torch.tensor(shares, dtype=torch.float64, device=got[0].device), world_group()).max())


def measure(case: Case, seconds: float, device: torch.device) -> dict[str, Any]:
    """The case's figures, by contestant; collective. RuntimeError if ours computes something else than transformers."""
    group = world_group()
    weights = make_weights(case)
    options: Any = {"device": device, "dtype": getattr(torch, case.dtype)}
    x = make_tokens(case, weights, group_rank(group)).to(**options).requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(**options)
    blocks = {name: build(name, case, weights, device) for name in (*THEIRS, OURS)}
    runs = {name: run_of(block, x, grad) for name, block in blocks.items()}
    results = {name: _output_and_gradient(run, x) for name, run in runs.items()}
    expected, found = results["transformers eager"], {}
    for name, block in blocks.items():
        difference = _difference(results[name], expected)
        if not difference <= TOLERANCE[case.dtype]:
            raise RuntimeError(f"{name} differs from transformers' eager block by {difference:.1e} of the norm")
        kept, peak = memory.kept_bytes(runs[name], block.parameters()), memory.peak_bytes(runs[name])
        most = all_max(torch.tensor([kept, peak], device=device), group).tolist()
        found[name] = {"kept_bytes_per_row": most[0] / case.rows, "peak_bytes": most[1], "difference": difference}
    taken = in_turn({FLOOR: products(case, device), **runs}, seconds, group, device)
    for name in taken:
        found[name] = found.get(name, {}) | summary(taken[name], taken[FLOOR])
    return {"case": asdict(case), "threads": torch.get_num_threads(), "results": found}


def main(job_file: str) -> None:
    """Measure the job's cases one by one; the first rank appends each to the job's `out`, a line each."""
    job = json.loads(Path(job_file).read_text())
    device = init_distributed()
    for fields in job["cases"]:
        figures = measure(Case(**fields), job["seconds"], device)
        gc.collect()
        if group_rank(world_group()) == 0:
            with Path(job["out"]).open("a") as file:
                file.write(json.dumps(figures) + "\n")
    leave(0)


if __name__ == "__main__":
    main(sys.argv[1])
