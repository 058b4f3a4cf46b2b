"""`alfb train` with the time inside torch.distributed's calls measured, for `python -m tests.hosts.delays`.

Rank 0 writes a line of JSON for each step to the file named by TIMES: seconds of the step, seconds inside exchanges
(waiting for slower ranks included) and their number.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from alfb_dist.cli import run_and_leave
from alfb_dist.training import loop as loop

_EXCHANGES = (
    "all_reduce",
    "all_to_all_single",
    "all_gather_into_tensor",
    "broadcast",
    "reduce",
    "barrier",
    "all_gather",
)
spent = {"seconds": 0.0, "exchanges": 0}


class Timed:
    """The work of an asynchronous call; waiting for it is counted."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def wait(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        done = self.work.wait(*arguments)
        spent["seconds"] += time.perf_counter() - start
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)


def timed(exchange: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        work = exchange(*arguments, **named)
        spent["seconds"] += time.perf_counter() - start
        spent["exchanges"] += 1
        return None if work is None else Timed(work)

    return call


def report(run: Any, step: int, batch: Any, loss: float, lr: float, seconds: float) -> None:
    """Write the step's times, then report as the loop does."""
    if run.group.rank() == 0:
        line = {"step": step, "seconds": seconds, "exchange_seconds": spent["seconds"], "exchanges": spent["exchanges"]}
        with open(os.environ["TIMES"], "a") as file:
            file.write(json.dumps(line) + "\n")
    spent.update(seconds=0.0, exchanges=0)
    plain_report(run, step, batch, loss, lr, seconds)


if __name__ == "__main__":
    for name in _EXCHANGES:
        setattr(dist, name, timed(getattr(dist, name)))
    plain_report, loop.report = loop.report, report
    run_and_leave(["train", *sys.argv[1:]])
