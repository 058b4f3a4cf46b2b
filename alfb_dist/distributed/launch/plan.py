"""Where the ranks of a run go, from the options of `alfb launch`; refused where they contradict each other."""

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
    """The options that `plan` reads."""
    group.add_argument("--with", dest="launcher", choices=list(LAUNCHERS), default="deepspeed", help="the launcher")
    group.add_argument("--ranks", type=int, help="number of ranks (default: the hostfile's slots, else ep_degree)")
    group.add_argument("--hostfile", type=Path, help="hosts and their ranks, one 'name slots=N' a line")
    group.add_argument("--nodes", type=int, default=1, help="torchrun: number of hosts; start this on each of them")
    group.add_argument("--node-rank", type=int, default=0, help="torchrun: which of them this is")
    group.add_argument("--master-addr", help="where rank 0 listens (default: the first host)")
    group.add_argument(
        "--master-port", type=int, help=f"its port (default: a free one; with other hosts {MASTER_PORT})"
    )
    group.add_argument("--launch-host", help="name or address by which ranks reach this command")
    group.add_argument("--launcher-args", default="", help="further words for the launcher, as one argument")


def plan(asked: argparse.Namespace, ep_degree: int) -> Launch:
    """The launch that was asked for. Raises ConfigError before anything starts."""
    hostfile = _hostfile(asked)
    hosts = read_hostfile(hostfile) if hostfile else {}
    addresses = [address_of(host) for host in hosts]
    _check_nodes(asked)
    here = not hosts and asked.nodes == 1 and asked.launcher != "srun"
    return Launch(
        launcher=asked.launcher,
        ranks=_ranks(asked, hosts, ep_degree),
        hosts=hosts,
        hostfile=hostfile,
        nodes=asked.nodes,
        node_rank=asked.node_rank,
        master_addr=asked.master_addr or first_address(addresses, asked.nodes),
        master_port=_port(asked.master_port) if here else asked.master_port or MASTER_PORT,
        launch_host=asked.launch_host or _launch_host(asked.launcher, addresses),
        launcher_args=tuple(shlex.split(asked.launcher_args)),
    )


def _hostfile(asked: argparse.Namespace) -> Path | None:
    given: Path | None = asked.hostfile
    if given and asked.launcher not in HOSTFILE_LAUNCHERS:
        raise ConfigError(f"--with {asked.launcher} takes no --hostfile: take one of {', '.join(HOSTFILE_LAUNCHERS)}")
    if given is None and asked.launcher == "deepspeed" and DEEPSPEED_HOSTFILE.is_file():
        return DEEPSPEED_HOSTFILE
    if given is None and asked.launcher == "openmpi":
        raise ConfigError("--with openmpi needs a --hostfile; for this host alone take --with mpirun")
    return given


def _ranks(asked: argparse.Namespace, hosts: dict[str, int], ep_degree: int) -> int | None:
    if asked.ranks is not None and asked.ranks < 1:
        raise ConfigError(f"--ranks ({asked.ranks}) must be at least 1")
    if hosts:
        slots = sum(hosts.values())
        if asked.ranks not in (None, slots):
            raise ConfigError(f"--ranks ({asked.ranks}) must equal the slots of the hostfile ({slots}): leave it out")
        return slots
    if asked.ranks is None and asked.launcher == "torchrun" and "PET_NPROC_PER_NODE" in os.environ:
        return None
    if asked.ranks is None and asked.launcher == "srun" and "SLURM_NTASKS" in os.environ:
        return int(os.environ["SLURM_NTASKS"])
    ranks = int(asked.ranks or ep_degree)
    if ranks % asked.nodes:
        raise ConfigError(f"--ranks ({ranks}) must be divisible by --nodes ({asked.nodes}): each host starts its part")
    return ranks


def _check_nodes(asked: argparse.Namespace) -> None:
    if asked.nodes != 1 and asked.launcher != "torchrun":
        raise ConfigError(f"--nodes ({asked.nodes}) is for --with torchrun; other launchers take a --hostfile")
    if not 0 <= asked.node_rank < asked.nodes:
        raise ConfigError(f"--node-rank ({asked.node_rank}) must be at least 0 and below --nodes ({asked.nodes})")
    if asked.node_rank and asked.master_addr is None:
        raise ConfigError("--node-rank above 0 needs --master-addr, the name or address of the first host")
    if asked.max_restarts < 0:
        raise ConfigError(f"--max-restarts ({asked.max_restarts}) must be at least 0")


def first_address(addresses: list[str], nodes: int = 1) -> str:
    """Where the ranks meet: the first host's address, as other hosts reach it."""
    if addresses:
        return address_toward(addresses) if addresses[0].startswith("127.") else addresses[0]
    return socket.gethostname() if nodes > 1 else "127.0.0.1"


def _launch_host(launcher: str, addresses: list[str]) -> str:
    if launcher == "srun":
        return socket.gethostname()
    return address_toward(addresses) if addresses else "127.0.0.1"


def _port(asked: int | None) -> int:
    """The port that was asked for, else a free one. ConfigError if that asked for cannot be used."""
    if asked is None:
        return free_port()
    try:
        with socket.create_server(("", asked)):
            return asked
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--master-port ({asked}) cannot be used here ({error}): take another or leave it out"
        ) from None
