"""`alfb launch`: start `alfb train` on every rank by any launcher; handle signals, exit codes and restarts."""

from __future__ import annotations

import argparse
import os
import shlex
from typing import Any

from alfb_dist.cli.train import add_config_options, config_words, read_config
from alfb_dist.distributed.launch.commands import command
from alfb_dist.distributed.launch.environment import environment_with_exports
from alfb_dist.distributed.launch.hostfile import ssh_command
from alfb_dist.distributed.launch.plan import add_options, plan
from alfb_dist.distributed.launch.signals import DONE
from alfb_dist.distributed.placement import check_placement


def add(commands: Any) -> None:
    """Add `alfb launch` to the commands."""
    launch = commands.add_parser(
        "launch",
        help="start all ranks of a training run, on one host or several, and supervise them",
        description="Start `alfb train` on every rank. TERM, INT and USR1 end the run after the current step, with a "
        "checkpoint and exit code 75.",
    )
    add_config_options(launch)
    add_options(launch.add_argument_group("ranks and hosts"))
    launch.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="resume up to N times after a crash (default: 0)"
    )
    launch.add_argument("--dry-run", action="store_true", help="print the exact command and exit")
    launch.set_defaults(run=_launch)


def _launch(arguments: argparse.Namespace) -> int:
    launch = plan(arguments, read_config(arguments).parallel.ep_degree)
    config = read_config(arguments, launch.ranks)
    parallel, settings = config.parallel, config_words(arguments)
    by_rank = [host for host, ranks in launch.hosts.items() for _ in range(ranks)]
    check_placement(by_rank, parallel.ep_degree, parallel.expert_placement)
    if arguments.dry_run:
        print(shlex.join(command(launch, settings)))
        return DONE

    from alfb_dist.distributed.launch.control_channel import ControlServer
    from alfb_dist.distributed.launch.preflight import check_hosts
    from alfb_dist.distributed.launch.supervisor import notify, supervise

    if launch.hosts:
        port = 0 if launch.launcher in ("mpirun", "openmpi") else launch.master_port  # mpi4py chooses one
        check_hosts(list(launch.hosts), port=port, ssh=ssh_command())
    environment = environment_with_exports(launch.master_addr) if launch.hosts else dict(os.environ)

    def attempt(control: str, resume: bool) -> tuple[list[str], dict[str, str]]:
        again = ["--set", "run.resume=true"] if resume and not config.run.resume else []
        words = command(launch, [*settings, *again])
        notify(shlex.join(words))
        return [*words, "--lifeline", control], environment

    return supervise(
        attempt,
        lambda: ControlServer(launch.launch_host),
        ranks=launch.local_ranks,
        max_restarts=arguments.max_restarts,
    )
