"""Large CPU tensors in memory that is kept for the next ones, as torch keeps it on CUDA.

The C library gives large blocks back to the system, which hands them out again page by page and zeroed: a tenth of the
time of an MoE layer's forward and backward. Here a block comes back when the last tensor on it is gone.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

LARGE = 1 << 20  # bytes from which a tensor is taken from here
SPARE = 1.25  # no more is kept than so many times what was in use at once; sizes have their peaks at different times
_STEP = 1 << 21  # a huge page, where the system has them

_free: list[mmap.mmap] = []
"""Blocks without a tensor, the one that has waited longest first."""


@dataclass
class _Use:
    """Bytes of the blocks with a tensor, now, at most so far, and at most since `grown` was asked."""

    now: int = 0
    most: int = 0
    lately: int = 0
    before: int = 0

    def add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.most, self.lately = max(self.most, self.now), max(self.lately, self.now)


_use = _Use()


class _Lease:
    """Held by the memory of a tensor; when it goes, so has the tensor."""

    def __init__(self, block: mmap.mmap) -> None:
        self._block, self._free, self._use = block, _free, _use  # the module may be gone before its last tensor
        _use.add(len(block))

    def __del__(self) -> None:
        self._use.add(-len(self._block))
        self._free.append(self._block)


def _block(num_bytes: int) -> mmap.mmap:
    fits = [b for b in _free if num_bytes <= len(b) <= 1.25 * num_bytes + _STEP]
    if fits:
        best = min(fits, key=len)
        _free.remove(best)
        return best
    size = -(-num_bytes // _STEP) * _STEP
    most = SPARE * max(_use.most, _use.now + size)
    while _free and _use.now + sum(map(len, _free)) + size > most:
        _free.pop(0)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def grown() -> int:
    """By how many bytes at most more was in use than when this was asked last. Torch's profiler does not see them."""
    growth = _use.lately - _use.before
    _use.lately = _use.before = _use.now
    return growth


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of this shape with the dtype and device of `like`; its values are whatever was there."""
    num_bytes = prod(shape) * like.element_size()
    if like.device.type != "cpu" or num_bytes < LARGE:
        return like.new_empty(shape)
    block = _block(num_bytes)
    memory = (ctypes.c_char * len(block)).from_buffer(block)
    memory.lease = _Lease(block)  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=like.dtype, count=prod(shape)).view(*shape)


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """As `empty`, with zeros."""
    return empty(shape, like).zero_()
