"""The checks of `alfb doctor`, one after another.

A check gathers facts and yields results; the verdict on the facts is a pure function in the same file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.device import check_accelerator
from alfb_dist.cli.doctor.exchange import check_exchange
from alfb_dist.cli.doctor.hosts import check_hosts
from alfb_dist.cli.doctor.kernels import check_kernels
from alfb_dist.cli.doctor.launchers import check_launchers
from alfb_dist.cli.doctor.machine import check_clock, check_disk, check_limits
from alfb_dist.cli.doctor.network import check_network
from alfb_dist.cli.doctor.packages import check_packages
from alfb_dist.cli.doctor.pitfalls import check_configuration
from alfb_dist.cli.doctor.result import Result, problem
from alfb_dist.cli.doctor.tracking import check_wandb

Check = Callable[[Case], Iterator[Result]]

CHECKS: tuple[Check, ...] = (
    check_packages,
    check_accelerator,
    check_kernels,
    check_launchers,
    check_hosts,
    check_network,
    check_limits,
    check_disk,
    check_clock,
    check_wandb,
    check_exchange,
    check_configuration,
)

LIMIT_SECONDS = 300.0
"""Time limit of a check. Checks have shorter limits of their own, but none for a disk that does not respond."""


def examine(case: Case, checks: tuple[Check, ...] = CHECKS, *, limit: float = LIMIT_SECONDS) -> Iterator[Result]:
    """Yield the results of each check. A check that raises or exceeds the limit becomes a problem."""
    for check in checks:
        yield from _run(check, case, limit)


def _run(check: Check, case: Case, limit: float) -> list[Result]:
    found: list[Result] = []
    name = check.__name__.removeprefix("check_")

    def run() -> None:
        try:
            for result in check(case):
                found.append(result)
        except Exception as error:
            text = f"the check failed: {type(error).__name__}: {error}"
            found.append(problem(name, text, "fix the cause that the message names, or report it"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        timed_out = problem(name, f"no answer within {limit:.0f} s", "find out which disk, host or driver hangs")
        return [*found, timed_out]
    return found
