"""Large CPU tensors in memory that is kept for later ones, as torch keeps it on CUDA.

The C library returns large blocks to the system, which hands them out again page by page and zeroed: a tenth of the
time of an MoE layer's forward and backward. Here a block is free again once no tensor refers to it.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

MIN_BYTES = 1 << 20  # smaller tensors are left to torch
MAX_KEPT = 1.25  # times the most bytes ever in use; above 1, since sizes have their peaks at different times
_PAGE = 1 << 21  # a huge page, where the system has them

_free_blocks: list[mmap.mmap] = []
"""Blocks that no tensor refers to, the one free for longest first."""


@dataclass
class _Usage:
    """Bytes of the blocks that tensors refer to: now, at most ever, and at most since `peak_growth` was last called."""

    current: int = 0
    peak: int = 0
    recent_peak: int = 0
    start: int = 0

    def add(self, num_bytes: int) -> None:
        self.current += num_bytes
        self.peak, self.recent_peak = max(self.peak, self.current), max(self.recent_peak, self.current)


_usage = _Usage()


class _Lease:
    """Attribute of a tensor's memory: deleted with the last tensor that refers to it, which frees the block."""

    def __init__(self, block: mmap.mmap) -> None:
        # Kept here too: at exit the module may be gone before its last tensor.
        self._block, self._free_blocks, self._usage = block, _free_blocks, _usage
        _usage.add(len(block))

    def __del__(self) -> None:
        self._usage.add(-len(self._block))
        self._free_blocks.append(self._block)


def _block(num_bytes: int) -> mmap.mmap:
    fitting = [b for b in _free_blocks if num_bytes <= len(b) <= 1.25 * num_bytes + _PAGE]
    if fitting:
        smallest = min(fitting, key=len)
        _free_blocks.remove(smallest)
        return smallest
    size = -(-num_bytes // _PAGE) * _PAGE
    limit = MAX_KEPT * max(_usage.peak, _usage.current + size)
    while _free_blocks and _usage.current + sum(map(len, _free_blocks)) + size > limit:
        _free_blocks.pop(0)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def peak_growth() -> int:
    """Return the most bytes in use since the last call beyond those in use then. Torch's profiler does not see them."""
    growth = _usage.recent_peak - _usage.start
    _usage.recent_peak = _usage.start = _usage.current
    return growth


def empty(shape: Sequence[int], like: Tensor) -> Tensor | None:
    """Return an uninitialised tensor with the dtype of `like`, or None unless it is on a CPU and large."""
    num_bytes = prod(shape) * like.element_size()
    if like.device.type != "cpu" or num_bytes < MIN_BYTES:
        return None
    block = _block(num_bytes)
    memory = (ctypes.c_char * len(block)).from_buffer(block)
    memory.lease = _Lease(block)  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=like.dtype, count=prod(shape)).view(*shape)


def allocate(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised tensor with the dtype and device of `like`: `empty`'s, or else torch's own."""
    tensor = empty(shape, like)
    return like.new_empty(shape) if tensor is None else tensor
