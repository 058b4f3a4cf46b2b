"""Messages by an all-to-all of bytes through torch.distributed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from alfb_dist.distributed.collectives import exchange_numbers, start_all_to_all_bytes
from alfb_dist.distributed.transport import Accept, Header


class NetworkTransport:
    """Reaches every rank of a group, on any device."""

    needs_headers = False

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device

    def buffers(self, sizes: list[int]) -> list[Tensor]:
        self._sizes = sizes
        self._message = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        return list(self._message.split(sizes))

    def start(self, headers: list[Header], accept: Accept, sizes: list[int] | None) -> Callable[[], list[Tensor]]:
        if sizes is None:
            received = exchange_numbers(headers, self._group, self._device)
            sizes = accept([Header(*numbers) for numbers in received])
        return start_all_to_all_bytes(self._message, self._sizes, sizes, self._group)
