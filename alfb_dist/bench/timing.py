"""Times of several contestants, taken in turn, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from alfb_dist.bench.contestants import Run
from alfb_dist.distributed.collectives import Group, all_max, barrier

MIN_ROUNDS = 5


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_once(run: Run, group: Group, device: torch.device) -> float:
    """Seconds of a forward and its backward on the slowest rank; collective."""
    barrier(group)
    start = _now(device)
    run.backward(run.forward())
    taken = torch.tensor([_now(device) - start], dtype=torch.float64, device=device)
    return float(all_max(taken, group))


def in_turn(runs: dict[str, Run], seconds: float, group: Group, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, A B C, B C A, ..., until the time is spent; collective.

    Two rounds come before that count for nothing. There are at least MIN_ROUNDS.
    """
    names = list(runs)
    for name in [*names, *names]:
        time_once(runs[name], group, device)
    taken: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        goes_on = True
        while goes_on:
            names = [*names[1:], names[0]]
            for name in names:
                taken[name].append(time_once(runs[name], group, device))
            gc.collect()
            more = float(len(taken[names[0]]) < MIN_ROUNDS or time.perf_counter() < end)
            goes_on = bool(all_max(torch.tensor([more], device=device), group))
    finally:
        gc.enable()
    return taken


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(taken: list[float], floor: list[float]) -> dict[str, Any]:
    """Milliseconds, and the ratio to the floor's time in the same round."""
    return {
        "ms": spread([1e3 * t for t in taken]),
        "ratio": spread([t / f for t, f in zip(taken, floor)]),
        "rounds": len(taken),
    }
