"""One of the two processes of doctor's exchange test: `python -m alfb_dist.cli.doctor.exchange_rank`.

Rank 0 prints one line of JSON: latency_seconds, of an exchange of one row; bytes_per_second, that each rank sends to
the other while both send; exact, whether every row came as it was sent.
"""

from __future__ import annotations

import json
import time
from statistics import median

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from alfb_dist.distributed.collectives import all_max, exchange_numbers, start_all_to_all_bytes, world_group
from alfb_dist.distributed.launch.signals import DONE
from alfb_dist.distributed.topology import init_distributed, leave

SMALL, LARGE = 1, 4096  # rows of 1,024 float32: 4 KiB and 16 MiB
REPEATS = {SMALL: 50, LARGE: 8}
SECONDS = 60


def exchange(rows: Tensor, group: ProcessGroup) -> tuple[Tensor, float]:
    """Send all rows to the other rank; return the rows that it sent and the seconds that this took."""
    other = 1 - group.rank()
    sizes = [0, 0]
    sizes[other] = rows.nbytes
    started = time.perf_counter()
    receive_sizes = [size for (size,) in exchange_numbers([[size] for size in sizes], group, rows.device)]
    received = start_all_to_all_bytes(rows.flatten().view(torch.uint8), sizes, receive_sizes, group)()[other]
    if rows.is_cuda:
        torch.cuda.synchronize()
    return received.view(rows.dtype).view(-1, rows.shape[1]), time.perf_counter() - started


def values(rank: int, num_rows: int, device: torch.device) -> Tensor:
    """Return the rows that a rank sends, (num_rows, 1024): whole numbers that depend on the rank and the position."""
    places = torch.arange(num_rows * 1024, device=device) % 8191
    return (places + rank * 8192).float().view(num_rows, 1024)


def main() -> None:
    """Measure, and let rank 0 print; collective over two ranks."""
    device = init_distributed(timeout_seconds=SECONDS)
    group = world_group()
    assert group is not None and group.size() == 2
    seconds, exact = {}, True
    for num_rows in (SMALL, LARGE):
        sent, expected = (values(rank, num_rows, device) for rank in (group.rank(), 1 - group.rank()))
        exchange(sent, group)  # connects
        found = [exchange(sent, group) for _ in range(REPEATS[num_rows])]
        exact = exact and all(torch.equal(received, expected) for received, _ in found)
        seconds[num_rows] = median(s for _, s in found)
    wrong = all_max(torch.tensor(int(not exact), device=device), group)
    if group.rank() == 0:
        speed = values(0, LARGE, device).nbytes / seconds[LARGE]
        print(json.dumps({"latency_seconds": seconds[SMALL], "bytes_per_second": speed, "exact": not wrong.item()}))
    leave(DONE)


if __name__ == "__main__":
    main()
