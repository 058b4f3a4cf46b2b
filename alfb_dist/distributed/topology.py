"""The start and end of torch.distributed in a process, and the expert-parallel x expert-data grid of its groups."""

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
        """The part of the experts that this rank holds."""
        return self.ep_group.rank()

    def __deepcopy__(self, memo: dict[int, Any]) -> Grid:
        """A copied model lives on the same ranks; process groups cannot be copied."""
        return self


def grid_ranks(world_size: int, ep_degree: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ranks of each expert-parallel and each expert-data group. Raises ValueError if sizes do not divide."""
    if ep_degree < 1 or world_size % ep_degree:
        raise ValueError(f"the world size ({world_size}) must be divisible by ep_degree ({ep_degree})")
    ep = [list(range(i, i + ep_degree)) for i in range(0, world_size, ep_degree)]
    return ep, [list(range(i, world_size, ep_degree)) for i in range(ep_degree)]


def make_grid(ep_degree: int, *, timeout_seconds: float = 600) -> Grid:
    """Return the grid over all ranks, with new groups; collective.

    Raises ValueError if the world size is not divisible, RuntimeError without torch.distributed, before any collective.
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
    """Give each rank of a host an equal share of its cores, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size()))


def _check_port(rank: int) -> None:
    """Raise ConfigError on rank 0 if it cannot listen at the port at which the ranks are to meet."""
    if rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun itself listens there
        return
    port = int(os.environ["MASTER_PORT"])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ConfigError(
            f"rank 0 on {socket.gethostname()} cannot listen at port {port} ({error}), where the ranks are to meet: "
            "end the process that has it or give the launcher another --master_port"
        ) from None


def init_distributed(*, timeout_seconds: float = 600, interface: str = "") -> torch.device:
    """Start torch.distributed (NCCL on CUDA, gloo otherwise), and return this rank's device; collective.

    timeout_seconds: of exchanges in the world group. interface: by which ranks reach each other, by default the one
    toward the first rank's host.
    Raises ConfigError without that interface, or on rank 0 if it cannot listen at the port at which the ranks are to
    meet; RuntimeError if not all ranks meet in time.
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
    """Wait for all ranks."""
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
            f"{where} within {timeout_seconds:g} s ({str(error).splitlines()[0]}); look for an error in the others' "
            "output, and check that their hosts reach that address"
        ) from error


def leave(code: int) -> NoReturn:
    """End the process with this exit code; collective where torch.distributed is up.

    All ranks end together, and without Python's shutdown, in which a process group's thread that releases a tensor
    would abort the process, whose work is done.
    """
    if not dist.is_initialized():
        sys.exit(code)
    end_distributed()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
