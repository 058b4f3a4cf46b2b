"""`alfb report`: a run's report.html."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from alfb_dist.distributed.launch.signals import DONE


def add(commands: Any) -> None:
    """The command and its options."""
    report = commands.add_parser("report", help="draw a run's report.html, also while it runs")
    report.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder, such as runs/demo")
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from alfb_dist.report import write_html

    print(write_html(arguments.run_folder))
    return DONE
