"""`alfb report`: the report.html of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from alfb_dist.distributed.launch.signals import DONE


def add(commands: Any) -> None:
    """Add `alfb report` to the commands."""
    report = commands.add_parser(
        "report",
        help="write report.html of a run, finished or still running",
        description="Write report.html into the directory of a run, finished or still running, and print its path.",
    )
    report.add_argument("run_folder", type=Path, metavar="RUN", help="the directory of a run, such as runs/demo")
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from alfb_dist.report import write_html

    print(write_html(arguments.run_folder))
    return DONE
