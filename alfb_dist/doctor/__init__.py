"""`alfb doctor`: whether this machine, the hosts and the configuration are fit for a run, and the mend where not.

A check yields results from facts that it gathers; the verdict on the facts is a pure function beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from alfb_dist.doctor.case import Case, read_hosts
from alfb_dist.doctor.device import accelerator
from alfb_dist.doctor.exchange import exchanges
from alfb_dist.doctor.hosts import hosts
from alfb_dist.doctor.kernels import kernels
from alfb_dist.doctor.launchers import launchers
from alfb_dist.doctor.machine import clock, disk, limits
from alfb_dist.doctor.network import network
from alfb_dist.doctor.packages import packages
from alfb_dist.doctor.pitfalls import configuration
from alfb_dist.doctor.result import Result, problem
from alfb_dist.doctor.tracking import tracking

__all__ = ["CHECKS", "Case", "Result", "examine", "read_hosts"]

Check = Callable[[Case], Iterator[Result]]

CHECKS: tuple[Check, ...] = (
    packages,
    accelerator,
    kernels,
    launchers,
    hosts,
    network,
    limits,
    disk,
    clock,
    tracking,
    exchanges,
    configuration,
)

LIMIT_SECONDS = 300.0
"""After this long a check is given up. Each has shorter limits of its own; a disk that does not answer has none."""


def examine(case: Case, checks: tuple[Check, ...] = CHECKS, *, limit: float = LIMIT_SECONDS) -> Iterator[Result]:
    """The results of the checks, as they come. A check that fails or does not end is a problem of its own."""
    for check in checks:
        yield from _within(check, case, limit)


def _within(check: Check, case: Case, limit: float) -> list[Result]:
    found: list[Result] = []

    def work() -> None:
        try:
            for result in check(case):
                found.append(result)
        except Exception as error:
            text = f"the check failed: {type(error).__name__}: {error}"
            found.append(problem(check.__name__, text, "mend what the message names, or report it"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        late = problem(check.__name__, f"no answer within {limit:.0f} s", "see which disk, host or driver hangs")
        return [*found, late]
    return found
