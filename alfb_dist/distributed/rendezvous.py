"""Rank, world size and local rank of this process, from the launcher that started it."""

from __future__ import annotations

import os
import re
import socket
import sys

from alfb_dist.distributed.network import own_address

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torch.distributed reads. The deepspeed launcher and torchrun set them."""

_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
_MPI_LOCAL = ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
_PMI = ("PMI_RANK", "PMI_SIZE")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")  # the latter is set by srun, not in a batch script
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")


def launched_world() -> tuple[int, int]:
    """Return (rank, world size) from the launcher's environment variables; (0, 1) without a launcher."""
    for rank, size in (VARIABLES[:2], _MPI, _SLURM, _PMI):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


def local_size() -> int:
    """Return the number of ranks on this host, 1 if the launcher does not give it."""
    if "SLURM_STEP_TASKS_PER_NODE" in os.environ and _by_srun():
        return _tasks_here(os.environ["SLURM_STEP_TASKS_PER_NODE"], int(os.environ.get("SLURM_NODEID", "0")))
    return next((int(os.environ[name]) for name in _LOCAL_SIZES if name in os.environ), 1)


def discover() -> tuple[int, int, int]:
    """Return (rank, world size, local rank), and set the environment variables that torch.distributed reads.

    The deepspeed launcher and torchrun set them; under srun they follow from Slurm's, under mpirun mpi4py gives them.
    A process without a launcher is a world of one. Raises RuntimeError if started by mpirun without mpi4py, or if the
    launcher set only some of the variables.
    """
    if not all(name in os.environ for name in VARIABLES):
        if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
            pass  # some may be missing, see below
        elif _MPI[1] in os.environ:
            _discover_mpi()
        elif _by_srun():
            _discover_slurm()
        elif _PMI[1] in os.environ:
            _discover_mpi()
        else:
            alone = ("0", "1", "0", "127.0.0.1", str(free_port()))
            os.environ.update(zip(VARIABLES, alone))
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise RuntimeError(f"the launcher set only some of {VARIABLES}; missing: {', '.join(missing)}")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def _discover_mpi() -> None:
    """Let the ranks meet at the first one's host: at its address toward MASTER_ADDR if that is set, else by its name.

    The launcher's local ranks are used where it sets them: Open MPI itself takes hosts of the same name for one host,
    and then fails in its collectives.
    """
    started_here = "mpi4py.MPI" not in sys.modules  # its import starts MPI
    try:
        from mpi4py import MPI
    except ImportError as e:
        raise RuntimeError("started by mpirun, but mpi4py is missing: pip install 'alfb_dist[mpi]'") from e
    world = MPI.COMM_WORLD
    if all(name in os.environ for name in _MPI_LOCAL):
        local_rank, size_here = (int(os.environ[name]) for name in _MPI_LOCAL)
    else:
        node = world.Split_type(MPI.COMM_TYPE_SHARED)
        local_rank, size_here = node.rank, node.size
    here = own_address(os.environ["MASTER_ADDR"]) if "MASTER_ADDR" in os.environ else MPI.Get_processor_name()
    address = here if world.size > size_here else "127.0.0.1"
    address, port = world.bcast((address, free_port()), root=0)
    values = (world.rank, world.size, local_rank, address, port)
    if started_here:
        MPI.Finalize()  # MPI is not needed any more, and would abort the ranks of a killed mpirun
    os.environ.update(zip(VARIABLES, map(str, values)))


def _by_srun() -> bool:
    return all(name in os.environ for name in _SLURM)


def _discover_slurm() -> None:
    """Derive the port from the job's number, since the ranks must choose the same one without communicating."""
    step = os.environ
    address = step.get("MASTER_ADDR") or first_host(step.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    number = int(step.get("SLURM_JOB_ID", "0")) * 16 + int(step.get("SLURM_STEP_ID", "0"))
    port = step.get("MASTER_PORT") or str(20_000 + number % 12_000)  # below the ports that systems assign
    values = (step["SLURM_PROCID"], step["SLURM_STEP_NUM_TASKS"], step.get("SLURM_LOCALID", "0"), address, port)
    os.environ.update(zip(VARIABLES, values))


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list such as "gpu[007-009,12]-ib,login1": gpu007-ib."""
    head = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^\[,]*)", nodelist)
    return "".join(part or "" for part in head.groups()) if head else nodelist


def _tasks_here(counts: str, node: int) -> int:
    """Return the number of tasks on a node by Slurm's list such as "4(x2),3": 4 on nodes 0 and 1, 3 on node 2."""
    each: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        each += [int(count)] * int(times or 1)
    return each[node] if node < len(each) else 1
