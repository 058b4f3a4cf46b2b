"""The command line of each launcher. All start `alfb train` with the same arguments, once for each rank."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from alfb_dist.config import ConfigError
from alfb_dist.distributed.launch.environment import variables_for_ranks
from alfb_dist.distributed.network import interface_of, own_address


@dataclass(frozen=True)
class Launch:
    """Where ranks are started, and by which launcher.

    hosts: number of ranks of each host in the hostfile; empty for this host alone. ranks: on all hosts; None where only
    the launcher's environment has it. nodes, node_rank: for torchrun, which is started on each host. launch_host: name
    or address by which ranks reach this process.
    """

    launcher: str
    ranks: int | None
    hosts: dict[str, int] = field(default_factory=dict)
    hostfile: Path | None = None
    nodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    launch_host: str = "127.0.0.1"
    launcher_args: tuple[str, ...] = ()

    @property
    def local_ranks(self) -> int | None:
        """The number of ranks that this command starts, None if unknown."""
        return None if self.ranks is None else self.ranks // self.nodes


def command(launch: Launch, arguments: list[str]) -> list[str]:
    """Return the launcher's command line for `alfb train`. Raises ConfigError if it is not installed."""
    return [*LAUNCHERS[launch.launcher](launch), "train", *arguments]


def executable(name: str, advice: str) -> str:
    """Return the path of a command, next to this Python or on PATH. Raises ConfigError with the advice without one."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    if not found:
        raise ConfigError(f"{name} is not installed: {advice}")
    return found


def _deepspeed(launch: Launch) -> list[str]:
    words = [executable("deepspeed", "pip install deepspeed"), "--log_level", "error"]
    if launch.hosts:
        kind = "openmpi" if launch.launcher == "openmpi" else "pdsh"
        executable(
            "ompi_info" if kind == "openmpi" else "pdsh",
            "it starts ranks on other hosts; install it or use --with mpirun",
        )
        words += ["--hostfile", str(launch.hostfile), "--launcher", kind, "--force_multi", "--no_ssh_check"]
        words += ["--master_addr", launch.master_addr]
    else:
        words += ["--num_accelerators", str(launch.ranks)]
    arguments = list(launch.launcher_args)
    if launch.launcher == "openmpi":
        # DeepSpeed would take eth0, whichever network that is on, and sets btl itself.
        interface = interface_of(own_address(launch.master_addr))
        parameters = {"coll": "^han", **({"btl_tcp_if_include": interface} if interface else {})}
        arguments += [*_mpi_options(), *_unless_given(parameters, launch.launcher_args)]
    words += ["--launcher_args", " ".join(arguments)] if arguments else []
    return [*words, "--master_port", str(launch.master_port), "--no_local_rank", "--module", "alfb_dist.cli"]


def _mpi_options() -> list[str]:
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [*as_root, "--bind-to", "none"]  # bound to one core each, ranks could not share the host's cores evenly


_MPI_OVER_HOSTS = {"btl": "self,tcp", "coll": "^han"}
"""MPI only lets ranks find each other. Between hosts of the same name Open MPI would use shared memory, and crash."""

_MPI_KEEPALIVE = {"oob_tcp_keepalive_time": "5", "oob_tcp_keepalive_intvl": "2", "oob_tcp_keepalive_probes": "5"}
"""The daemon of a host that is cut off ends within seconds, not minutes."""


def _unless_given(parameters: dict[str, str], arguments: tuple[str, ...], option: str = "--mca") -> list[str]:
    """Return the words that set these parameters of Open MPI, except those that the user has set."""
    return [word for name, value in parameters.items() if name not in arguments for word in (option, name, value)]


def _mpirun(launch: Launch) -> list[str]:
    words = [executable("mpirun", "pip install 'alfb_dist[mpi]'"), *_mpi_options(), "-n", str(launch.ranks)]
    if launch.hosts:
        words += ["--hostfile", str(launch.hostfile), *_unless_given(_MPI_OVER_HOSTS, launch.launcher_args)]
        words += _unless_given(_MPI_KEEPALIVE, launch.launcher_args, "--prtemca")
        for name, value in variables_for_ranks(launch.master_addr).items():
            words += ["-x", name if os.environ.get(name) == value else f"{name}={value}"]
    else:
        words += ["--map-by", ":OVERSUBSCRIBE"]
    return [*words, *launch.launcher_args, sys.executable, "-m", "alfb_dist.cli"]


def _torchrun(launch: Launch) -> list[str]:
    words = [executable("torchrun", "pip install torch")]
    if launch.ranks is not None:  # else torchrun reads PET_NNODES and others
        words += ["--nnodes", str(launch.nodes), "--node-rank", str(launch.node_rank)]
        words += ["--nproc-per-node", str(launch.local_ranks)]
        words += ["--master-addr", launch.master_addr, "--master-port", str(launch.master_port)]
    return [*words, *launch.launcher_args, "-m", "alfb_dist.cli"]


def _srun(launch: Launch) -> list[str]:
    words = [executable("srun", "use --with srun inside a Slurm allocation"), "--ntasks", str(launch.ranks)]
    return [*words, "--kill-on-bad-exit=1", *launch.launcher_args, sys.executable, "-m", "alfb_dist.cli"]


LAUNCHERS: dict[str, Callable[[Launch], list[str]]] = {
    "deepspeed": _deepspeed,
    "openmpi": _deepspeed,
    "mpirun": _mpirun,
    "torchrun": _torchrun,
    "srun": _srun,
}

HOSTFILE_LAUNCHERS = ("deepspeed", "openmpi", "mpirun")
