"""Large CPU tensors in memory that is kept for the next ones, as torch keeps it on CUDA.

The C library gives large blocks back to the system, which hands them out again page by page and zeroed: a tenth of the
time of an MoE layer's forward and backward. Here a block comes back when the last tensor on it is gone.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

LARGE = 1 << 20  # bytes from which a tensor is taken from here
_STEP = 1 << 21  # a huge page, where the system has them

_free: list[mmap.mmap] = []
"""Blocks without a tensor, the one that has waited longest first."""


class _Lease:
    """Held by the memory of a tensor; when it goes, so has the tensor."""

    def __init__(self, block: mmap.mmap) -> None:
        self._block, self._free = block, _free  # a name of the module may be gone before its last tensor

    def __del__(self) -> None:
        self._free.append(self._block)


def _block(num_bytes: int) -> mmap.mmap:
    fits = [b for b in _free if num_bytes <= len(b) <= 1.25 * num_bytes + _STEP]
    if fits:
        best = min(fits, key=len)
        _free.remove(best)
        return best
    if _free:  # sizes have changed: no more memory is kept than was once in use
        _free.pop(0)
    block = mmap.mmap(-1, -(-num_bytes // _STEP) * _STEP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


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
