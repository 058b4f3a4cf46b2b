"""Times of several contestants taken in turn, so that other load on the machine falls on all of them alike."""

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
    """Return the seconds of a forward and its backward on the slowest rank; collective."""
    barrier(group)
    start = _now(device)
    run.backward(run.forward())
    elapsed = torch.tensor([_now(device) - start], dtype=torch.float64, device=device)
    return float(all_max(elapsed, group))


def time_in_turn(runs: dict[str, Run], seconds: float, group: Group, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each contestant in each round, A B C, B C A, ..., until the time is spent; collective.

    Two rounds for warming up are not counted. There are at least MIN_ROUNDS.
    """
    names = list(runs)
    for name in [*names, *names]:
        time_once(runs[name], group, device)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        more = True
        while more:
            names = [*names[1:], names[0]]
            for name in names:
                times[name].append(time_once(runs[name], group, device))
            gc.collect()
            unfinished = float(len(times[names[0]]) < MIN_ROUNDS or time.perf_counter() < end)
            more = bool(all_max(torch.tensor([unfinished], device=device), group))  # on every rank alike
    finally:
        gc.enable()
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(times: list[float], floor: list[float]) -> dict[str, Any]:
    """Return milliseconds, and the ratio to the floor's time in the same round, each with its range."""
    return {
        "ms": spread([1e3 * t for t in times]),
        "ratio": spread([t / f for t, f in zip(times, floor)]),
        "rounds": len(times),
    }
