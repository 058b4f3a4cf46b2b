"""`alfb doctor`: check that this machine, the hosts and the configuration are fit for a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alfb_dist.config import ConfigError, load_config
from alfb_dist.distributed.launch.hostfile import read_hostfile
from alfb_dist.distributed.launch.signals import DONE

if TYPE_CHECKING:
    from alfb_dist.cli.doctor.case import Case
    from alfb_dist.cli.doctor.result import Result

FOUND_PROBLEMS = 1
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "not applicable": "dim"}


def add(commands: Any) -> None:
    """Add `alfb doctor` to the commands."""
    doctor = commands.add_parser(
        "doctor",
        help="check this machine, the hosts and the configuration of a run, and suggest fixes",
        description="Check this machine and, if given, the hosts and the configuration of a run, and suggest fixes. "
        "Exit code 0: no problem, but possibly warnings; 1: a problem that would stop a run or make it silently wrong.",
    )
    doctor.add_argument("config", nargs="?", type=Path, help="configuration file, such as configs/demo.toml")
    doctor.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, such as balance.rate=0.001; may be repeated",
    )
    doctor.add_argument(
        "--hostfile", type=Path, help='hosts and their ranks, one line such as "node1 slots=8" for each'
    )
    doctor.add_argument("--json", action="store_true", help="print a JSON list of results instead of a table")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from alfb_dist.cli.doctor.examine import examine

    results = examine(_case(arguments))
    found = _print_json(results) if arguments.json else _print_table(results)
    return FOUND_PROBLEMS if any(result.verdict == "problem" for result in found) else DONE


def _case(arguments: argparse.Namespace) -> Case:
    from alfb_dist.cli.doctor.case import Case

    hosts: dict[str, int] = {}
    config_problems: tuple[str, ...] = ()
    hostfile_error, config = "", None
    if arguments.hostfile:
        try:
            hosts = read_hostfile(arguments.hostfile)
        except ConfigError as error:
            hostfile_error = str(error)
    if arguments.config:
        try:
            config = load_config(arguments.config, arguments.overrides, world_size=sum(hosts.values()) or None)
        except ConfigError as error:
            config_problems = error.problems
    return Case(config, config_problems, hosts, hostfile_error)


def _print_json(results: Iterable[Result]) -> list[Result]:
    found = list(results)
    print(json.dumps([asdict(result) for result in found], indent=1))
    return found


def _print_table(results: Iterable[Result]) -> list[Result]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    found = []
    table = Table("check", "verdict", "found, and the fix", box=None, padding=(0, 2, 0, 0))
    with console.status("") as status:
        for result in results:
            found.append(result)
            status.update(result.check)
            text = Text(result.found)
            if result.fix:
                text.append(f"\n-> {result.fix}", style="bold")
            table.add_row(result.check, Text(result.verdict, style=_STYLES[result.verdict]), text)
    console.print(table)
    counts = {verdict: sum(result.verdict == verdict for result in found) for verdict in ("problem", "warning")}
    console.print(f"{counts['problem']} problems, {counts['warning']} warnings", highlight=False)
    return found
