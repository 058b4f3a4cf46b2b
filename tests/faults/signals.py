"""Signals to every launcher, sent to the command, a rank, the process group and the launcher inside: a save, exit code
75 and no process left, each time.

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

from faults.jobs import LAUNCHERS, Job, by_hand, options, send, tries, watched

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Case:
    """What is sent where. by_hand: to the launcher itself, without alfb launch around it."""

    launcher: str
    number: signal.Signals
    target: str
    by_hand: bool = False

    @property
    def code(self) -> int | None:
        """The exit code that the command must end with; None where it is not ours to decide."""
        if self.by_hand:
            return 75 if self.target == "rank" and self.launcher != "torchrun" else None
        return 137 if (self.number, self.target) == (signal.SIGKILL, "command") else 75


def cases(launchers: tuple[str, ...] = LAUNCHERS) -> list[Case]:
    """All that alfb launch answers for."""
    found = [Case(*case) for case in product(launchers, STOPS, ("command", "rank", "group"))]
    return found + [Case(name, signal.SIGKILL, target) for name in launchers for target in ("command", "inside")]


def cases_by_hand(launchers: tuple[str, ...] = LAUNCHERS) -> list[Case]:
    """What the ranks answer for where a launcher is started by hand.

    Not TERM and INT to mpirun: it kills its ranks at once, whatever they do.
    """
    found = [Case(*case, by_hand=True) for case in product(launchers, STOPS, ("command", "rank", "group"))]
    found += [Case(name, signal.SIGKILL, "command", by_hand=True) for name in launchers]
    return [c for c in found if c.launcher != "mpirun" or c.target == "rank" or c.number == signal.SIGUSR1]


def problem(case: Case, folder: Path, seed: int) -> str:
    """What was not as promised; empty if nothing. The signal comes at a random moment of a random early step."""
    chance = random.Random(seed)
    command = by_hand(case.launcher) if case.by_hand else watched(case.launcher)
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
    by_hand_help = "the launchers by themselves, without alfb launch"
    asked = options(
        __doc__ or "",
        by_hand={"action": "store_true", "help": by_hand_help},
        signal={"choices": ("TERM", "INT", "USR1", "KILL"), "action": "append", "help": "only this one"},
        target={"choices": ("command", "rank", "group", "inside"), "action": "append", "help": "only to this"},
    )
    failures = 0
    for case in (cases_by_hand if asked.by_hand else cases)(tuple(asked.launcher or LAUNCHERS)):
        number = case.number.name.removeprefix("SIG")
        if number in (asked.signal or [number]) and case.target in (asked.target or [case.target]):
            name = f"{case.launcher:9} {number:4} to {case.target:8}"
            failures += tries(asked, name, partial(problem, case))
    print(f"{failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
