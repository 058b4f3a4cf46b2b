"""Where the ranks of a run are started, by the options of `alfb launch`."""

from __future__ import annotations

import argparse
import os
import shlex
import socket
from pathlib import Path

from alfb_dist.config import ConfigError
from alfb_dist.distributed.launch.commands import HOSTFILE_LAUNCHERS, LAUNCHERS, Launch
from alfb_dist.distributed.launch.hostfile import DEEPSPEED_HOSTFILE, address_of, address_toward, read_hostfile
from alfb_dist.distributed.rendezvous import free_port

MASTER_PORT = 29500


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that `plan` reads."""
    group.add_argument("--with", dest="launcher", choices=list(LAUNCHERS), default="deepspeed", help="the launcher")
    group.add_argument("--ranks", type=int, help="number of ranks (default: the hostfile's slots, else ep_degree)")
    group.add_argument("--hostfile", type=Path, help="hosts and their ranks, a line 'name slots=N' for each")
    group.add_argument("--nodes", type=int, default=1, help="torchrun: number of hosts; start this on each of them")
    group.add_argument("--node-rank", type=int, default=0, help="torchrun: index of this host")
    group.add_argument("--master-addr", help="address of rank 0 (default: the first host)")
    group.add_argument(
        "--master-port", type=int, help=f"port of rank 0 (default: a free one; with other hosts {MASTER_PORT})"
    )
    group.add_argument("--launch-host", help="name or address by which ranks reach this command")
    group.add_argument("--launcher-args", default="", help="more arguments for the launcher, as one string")


def plan(options: argparse.Namespace, ep_degree: int) -> Launch:
    """Return the launch for these options. Raises ConfigError if they contradict each other."""
    hostfile = _hostfile(options)
    hosts = read_hostfile(hostfile) if hostfile else {}
    addresses = [address_of(host) for host in hosts]
    _check_nodes(options)
    here = not hosts and options.nodes == 1 and options.launcher != "srun"
    return Launch(
        launcher=options.launcher,
        ranks=_ranks(options, hosts, ep_degree),
        hosts=hosts,
        hostfile=hostfile,
        nodes=options.nodes,
        node_rank=options.node_rank,
        master_addr=options.master_addr or first_address(addresses, options.nodes),
        master_port=_port(options.master_port) if here else options.master_port or MASTER_PORT,
        launch_host=options.launch_host or _launch_host(options.launcher, addresses),
        launcher_args=tuple(shlex.split(options.launcher_args)),
    )


def _hostfile(options: argparse.Namespace) -> Path | None:
    given: Path | None = options.hostfile
    if given and options.launcher not in HOSTFILE_LAUNCHERS:
        raise ConfigError(f"--with {options.launcher} takes no --hostfile: use one of {', '.join(HOSTFILE_LAUNCHERS)}")
    if given is None and options.launcher == "deepspeed" and DEEPSPEED_HOSTFILE.is_file():
        return DEEPSPEED_HOSTFILE
    if given is None and options.launcher == "openmpi":
        raise ConfigError("--with openmpi needs a --hostfile; for this host alone use --with mpirun")
    return given


def _ranks(options: argparse.Namespace, hosts: dict[str, int], ep_degree: int) -> int | None:
    if options.ranks is not None and options.ranks < 1:
        raise ConfigError(f"--ranks ({options.ranks}) must be at least 1")
    if hosts:
        slots = sum(hosts.values())
        if options.ranks not in (None, slots):
            raise ConfigError(f"--ranks ({options.ranks}) must equal the slots of the hostfile ({slots}): omit it")
        return slots
    if options.ranks is None and options.launcher == "torchrun" and "PET_NPROC_PER_NODE" in os.environ:
        return None
    if options.ranks is None and options.launcher == "srun" and "SLURM_NTASKS" in os.environ:
        return int(os.environ["SLURM_NTASKS"])
    ranks = int(options.ranks or ep_degree)
    if ranks % options.nodes:
        raise ConfigError(
            f"--ranks ({ranks}) must be divisible by --nodes ({options.nodes}): each host starts an equal part"
        )
    return ranks


def _check_nodes(options: argparse.Namespace) -> None:
    if options.nodes != 1 and options.launcher != "torchrun":
        raise ConfigError(f"--nodes ({options.nodes}) is for --with torchrun; other launchers take a --hostfile")
    if not 0 <= options.node_rank < options.nodes:
        raise ConfigError(f"--node-rank ({options.node_rank}) must be at least 0 and below --nodes ({options.nodes})")
    if options.node_rank and options.master_addr is None:
        raise ConfigError("--node-rank above 0 needs --master-addr, the name or address of the first host")
    if options.max_restarts < 0:
        raise ConfigError(f"--max-restarts ({options.max_restarts}) must be at least 0")


def first_address(addresses: list[str], nodes: int = 1) -> str:
    """Return the address at which the ranks meet: the first host's, as other hosts reach it."""
    if addresses:
        return address_toward(addresses) if addresses[0].startswith("127.") else addresses[0]
    return socket.gethostname() if nodes > 1 else "127.0.0.1"


def _launch_host(launcher: str, addresses: list[str]) -> str:
    if launcher == "srun":
        return socket.gethostname()
    return address_toward(addresses) if addresses else "127.0.0.1"


def _port(port: int | None) -> int:
    """Return the port, or a free one if None. Raises ConfigError if it cannot be used."""
    if port is None:
        return free_port()
    try:
        with socket.create_server(("", port)):
            return port
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--master-port ({port}) cannot be used here ({error}): choose another or omit it") from None
