"""Kill a rank with -9 at a random step: the run resumes by itself from its newest good save, and ends with the metrics
of an undisturbed run.

    cd tests && python -m faults.restarts --times 20
"""

from __future__ import annotations

import random
import re
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from faults.jobs import Job, options, send, supervised, tries

INTERVAL, STEPS = 4, 14
SETTINGS = (f"train.steps={STEPS}", f"train.checkpoint_interval={INTERVAL}")


def undisturbed(launcher: str, folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of an undisturbed run."""
    with Job(folder, supervised(launcher), *SETTINGS) as job:
        code = job.end()
        if code:
            raise RuntimeError(f"exit code {code}\n{job.text()[-3000:]}")
        return job.metrics()


def problem(launcher: str, folder: Path, seed: int, expected: list[dict[str, Any]]) -> str:
    """Return what went wrong, '' if nothing."""
    chance = random.Random(seed)
    with Job(folder, supervised(launcher, "--max-restarts", "1"), *SETTINGS) as job:
        try:
            job.until_step(chance.randint(1, STEPS - 2))
            time.sleep(chance.random() * 0.2)
            send(job, signal.SIGKILL, "rank", chance.choice)
            job.until(lambda: "restart 1 of 1" in job.text(), "the restart")
            before = job.steps()[-1]
            code = job.end()
        except TimeoutError as error:
            return f"{error}"
        resumed = re.search(r"resumed from step-(\d+)", job.text())
        lost = before - int(resumed[1] if resumed else 0)
        if code != 0 or not 0 <= lost <= INTERVAL:
            return f"exit code {code}, {lost} steps lost\n{job.text()[-3000:]}"
        if job.metrics() != expected:
            return f"other metrics: steps {job.steps()}, killed at {before}, {lost} steps lost"
    return ""


def main() -> int:
    arguments, failures = options(__doc__ or ""), 0
    for launcher in arguments.launcher or ["deepspeed"]:
        with tempfile.TemporaryDirectory(prefix="alfb-restarts-") as folder:
            expected = undisturbed(launcher, Path(folder))
        attempt = partial(problem, launcher, expected=expected)
        failures += tries(arguments, f"{launcher:9} KILL to a rank, resumed to the same metrics", attempt)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
