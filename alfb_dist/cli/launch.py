"""`alfb launch`: `alfb train` once a rank, by any launcher, with signals, exit code and restarts in one hand."""

from __future__ import annotations

import argparse
import os
import shlex

from alfb_dist.cli.parser import Subcommands
from alfb_dist.cli.train import add_settings, read_config, settings_of
from alfb_dist.distributed.launch.commands import command
from alfb_dist.distributed.launch.environment import environment_with_exports
from alfb_dist.distributed.launch.hostfile import ssh_command
from alfb_dist.distributed.launch.plan import add_options, plan
from alfb_dist.distributed.launch.signals import DONE
from alfb_dist.distributed.placement import check_placement


def add(commands: Subcommands) -> None:
    """The command and its options."""
    launch = commands.add_parser("launch", help="start a training run on one host or many, and watch over it")
    add_settings(launch)
    add_options(launch.add_argument_group("where"))
    launch.add_argument("--max-restarts", type=int, default=0, help="after a crash, resume up to N times (default: 0)")
    launch.add_argument("--dry-run", action="store_true", help="print the exact command and start nothing")
    launch.set_defaults(run=_launch)


def _launch(arguments: argparse.Namespace) -> int:
    launch = plan(arguments, read_config(arguments).parallel.ep_degree)
    config = read_config(arguments, launch.ranks)
    parallel, settings = config.parallel, settings_of(arguments)
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

    def attempt(lifeline: str, resume: bool) -> tuple[list[str], dict[str, str]]:
        again = ["--set", "run.resume=true"] if resume and not config.run.resume else []
        words = command(launch, [*settings, *again])
        notify(shlex.join(words))
        return [*words, "--lifeline", lifeline], environment

    return supervise(
        attempt,
        lambda: ControlServer(launch.launch_host),
        ranks=launch.local_ranks,
        max_restarts=arguments.max_restarts,
    )
