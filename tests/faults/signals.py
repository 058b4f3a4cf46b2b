"""Signals to every launcher, sent to the command, a rank, the process group and the launcher inside: a save, exit code
75 and no process left, each time.

    cd tests && python -m faults.signals --times 20
    cd tests && python -m faults.signals --times 5 --launcher torchrun --by-hand
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from faults.jobs import LAUNCHERS, Job, by_hand, send, watched

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
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--times", type=int, default=1, help="how often each case is tried")
    parser.add_argument("--launcher", choices=LAUNCHERS, action="append", help="only this one")
    parser.add_argument("--by-hand", action="store_true", help="the launchers by themselves, without alfb launch")
    arguments = parser.parse_args()
    launchers = tuple(arguments.launcher or LAUNCHERS)
    failures = 0
    for case in (cases_by_hand if arguments.by_hand else cases)(launchers):
        good = 0
        for seed in range(arguments.times):
            with tempfile.TemporaryDirectory(prefix="alfb-signals-") as folder:
                found = problem(case, Path(folder), seed)
            good += not found
            if found:
                print(f"  seed {seed}: {found}", flush=True)
        failures += arguments.times - good
        print(f"{case.launcher:9} {case.number.name:7} to {case.target:8} {good}/{arguments.times}", flush=True)
    print(f"{failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
