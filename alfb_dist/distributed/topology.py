"""Who this process is (rank, world, local rank) and where it stands in the expert-parallel x expert-data grid."""

from __future__ import annotations

import logging
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from alfb_dist.config import ConfigError
from alfb_dist.distributed.collectives import end_distributed, new_groups, start_distributed
from alfb_dist.distributed.network import choose_interface
from alfb_dist.distributed.rendezvous import discover, local_size


@dataclass(frozen=True)
class Grid:
    """An expert-parallel x expert-data grid over a group of ranks.

    Consecutive ranks form an expert-parallel group: rank r holds part r % ep_degree of the experts. Ranks that hold
    the same part form an expert-data group, over which expert gradients are averaged.
    """

    ep_degree: int
    ep_group: ProcessGroup
    expert_data_group: ProcessGroup
    world_group: ProcessGroup

    @property
    def ep_rank(self) -> int:
        """Which part of the experts this rank holds."""
        return self.ep_group.rank()

    def __deepcopy__(self, memo: dict[int, Any]) -> Grid:
        """A copied model lives on the same ranks; process groups cannot be copied."""
        return self


def grid_ranks(world_size: int, ep_degree: int) -> tuple[list[list[int]], list[list[int]]]:
    """The ranks of the expert-parallel groups and of the expert-data groups; ValueError where they do not divide."""
    if ep_degree < 1 or world_size % ep_degree:
        raise ValueError(f"the world size ({world_size}) must be divisible by ep_degree ({ep_degree})")
    ep = [list(range(i, i + ep_degree)) for i in range(0, world_size, ep_degree)]
    return ep, [list(range(i, world_size, ep_degree)) for i in range(ep_degree)]


def make_grid(ep_degree: int, *, timeout_seconds: float = 600) -> Grid:
    """The grid over all ranks, with groups of its own; collective. torch.distributed must be up.

    Raises ValueError if the world size is not divisible, RuntimeError without torch.distributed; before any collective.
    """
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call alfb_dist.init_distributed() first")
    ep, data = grid_ranks(dist.get_world_size(), ep_degree)
    ep_groups, data_groups = new_groups(ep, timeout_seconds), new_groups(data, timeout_seconds)
    rank = dist.get_rank()
    world = dist.group.WORLD
    assert world is not None
    return Grid(ep_degree, ep_groups[rank // ep_degree], data_groups[rank % ep_degree], world)


def _share_cores() -> None:
    """The ranks of a node share its cores evenly, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size()))


def _check_port(rank: int) -> None:
    """Nothing, or ConfigError where rank 0 cannot listen at the port at which the ranks are to meet."""
    if rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun itself listens there
        return
    port = int(os.environ["MASTER_PORT"])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ConfigError(
            f"rank 0 on {socket.gethostname()} cannot listen at port {port} ({error}), where the ranks are to meet: "
            "another run or process has it; give the launcher another --master_port"
        ) from None


def init_distributed(*, timeout_seconds: float = 600, interface: str = "") -> torch.device:
    """torch.distributed is up (NCCL on CUDA, gloo otherwise), with our timeout; returns this rank's device.

    interface: of the network, by which ranks reach each other; that toward the first rank's host unless given.
    Raises ConfigError on rank 0 if it cannot listen at the port where the ranks are to meet.
    """
    rank, _, local_rank = discover()
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        _share_cores()
    if not dist.is_initialized():
        _check_port(rank)
        _meet("nccl" if cuda else "gloo", timeout_seconds, interface)
    return device


def _meet(backend: str, timeout_seconds: float, interface: str) -> None:
    """All ranks are there, or RuntimeError."""
    try:
        choose_interface(os.environ["MASTER_ADDR"], interface)
    except ValueError as error:
        raise ConfigError(f"{socket.gethostname()}: {error}") from None
    try:
        start_distributed(backend, timeout_seconds)
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RuntimeError(
            f"rank {os.environ['RANK']} on {socket.gethostname()}: not all {os.environ['WORLD_SIZE']} ranks met at "
            f"{where} within {timeout_seconds:g} s ({str(error).splitlines()[0]}); a rank has ended before, as its own "
            "output says, or its host does not reach that address"
        ) from error


def leave(code: int) -> NoReturn:
    """The process has ended with this exit code; collective where torch.distributed is up.

    All ranks leave together, and at once: while Python winds itself down, a thread of a process group that lets go of
    a tensor would abort the process, whose work is done.
    """
    if not dist.is_initialized():
        sys.exit(code)
    end_distributed()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
