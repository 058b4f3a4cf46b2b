"""`alfb doctor`: whether this machine, the hosts and the configuration are fit for a run, and the fix where not.

A check yields results from facts that it gathers; the verdict on the facts is a pure function beside it.
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
"""After this long a check is given up. Each has shorter limits of its own; a disk that does not answer has none."""


def examine(case: Case, checks: tuple[Check, ...] = CHECKS, *, limit: float = LIMIT_SECONDS) -> Iterator[Result]:
    """The results of the checks, as they come. A check that fails or does not end is a problem of its own."""
    for check in checks:
        yield from _within(check, case, limit)


def _within(check: Check, case: Case, limit: float) -> list[Result]:
    found: list[Result] = []
    name = check.__name__.removeprefix("check_")

    def work() -> None:
        try:
            for result in check(case):
                found.append(result)
        except Exception as error:
            text = f"the check failed: {type(error).__name__}: {error}"
            found.append(problem(name, text, "fix what the message names, or report it"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        late = problem(name, f"no answer within {limit:.0f} s", "see which disk, host or driver hangs")
        return [*found, late]
    return found
