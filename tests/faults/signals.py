"""Send signals to every launcher, to the command, a rank, the process group and the launcher inside: each time there is
a save, exit code 75 and no process left.

    cd tests && python -m faults.signals --times 20
    cd tests && python -m faults.signals --times 5 --launcher torchrun --by-hand --signal TERM --target rank
"""

from __future__ import annotations

import random
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from faults.jobs import LAUNCHERS, Job, by_hand, options, send, supervised, tries

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Case:
    """A signal and its target. by_hand: the launcher is started without alfb launch."""

    launcher: str
    number: signal.Signals
    target: str
    by_hand: bool = False

    @property
    def code(self) -> int | None:
        """The exit code that the command must have; None where the launcher decides."""
        if self.by_hand:
            return 75 if self.target == "rank" and self.launcher != "torchrun" else None
        return 137 if (self.number, self.target) == (signal.SIGKILL, "command") else 75


def cases(launchers: tuple[str, ...] = LAUNCHERS) -> list[Case]:
    """Return the cases for which alfb launch is responsible."""
    found = [Case(*case) for case in product(launchers, STOPS, ("command", "rank", "group"))]
    return found + [Case(name, signal.SIGKILL, target) for name in launchers for target in ("command", "inside")]


def cases_by_hand(launchers: tuple[str, ...] = LAUNCHERS) -> list[Case]:
    """Return the cases for which the ranks are responsible, under a launcher that was started by hand.

    Without TERM and INT to mpirun, which kills its ranks at once, whatever they do.
    """
    found = [Case(*case, by_hand=True) for case in product(launchers, STOPS, ("command", "rank", "group"))]
    found += [Case(name, signal.SIGKILL, "command", by_hand=True) for name in launchers]
    return [c for c in found if c.launcher != "mpirun" or c.target == "rank" or c.number == signal.SIGUSR1]


def problem(case: Case, folder: Path, seed: int) -> str:
    """Send the signal at a random moment of a random early step; return what went wrong, '' if nothing."""
    chance = random.Random(seed)
    command = by_hand(case.launcher) if case.by_hand else supervised(case.launcher)
    with Job(folder, command, "train.steps=100000", "train.checkpoint_interval=0") as job:
        try:
            job.until_step(chance.randint(1, 8))
            time.sleep(chance.random() * 0.2)
            send(job, case.number, case.target, chance.choice)
            code = job.end()
        except TimeoutError as error:
            return str(error)
        if job.saves() != job.steps()[-1:]:
            return f"saved at {job.saves()}, last step {job.steps()[-1:]}\n{job.text()[-3000:]}"
        if case.code not in (None, code):
            return f"exit code {code}, not {case.code}\n{job.text()[-3000:]}"
    return ""


def main() -> int:
    by_hand_help = "start the launchers without alfb launch"
    arguments = options(
        __doc__ or "",
        by_hand={"action": "store_true", "help": by_hand_help},
        signal={"choices": ("TERM", "INT", "USR1", "KILL"), "action": "append", "help": "only this one"},
        target={"choices": ("command", "rank", "group", "inside"), "action": "append", "help": "only to this"},
    )
    failures = 0
    for case in (cases_by_hand if arguments.by_hand else cases)(tuple(arguments.launcher or LAUNCHERS)):
        number = case.number.name.removeprefix("SIG")
        if number in (arguments.signal or [number]) and case.target in (arguments.target or [case.target]):
            name = f"{case.launcher:9} {number:4} to {case.target:8}"
            failures += tries(arguments, name, partial(problem, case))
    print(f"{failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
