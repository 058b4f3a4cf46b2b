"""Causal attention on a CPU in float32 (csrc/attention.c), between products of torch's own BLAS."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alfb_dist.cpu.allocator import allocate
from alfb_dist.cpu.build import Library

PIECE = 64
"""Queries that are computed together; they meet the keys up to the last of them, so few queries spare more products."""

MAX_LENGTH = 2048
"""The most positions: half of the length squared is kept for the backward, for each head."""

ATTENTION = Library(
    "attention.c",
    {"attention_kept": (0, 1), "attention_forward": (0, 8), "attention_backward": (0, 12)},
    returning=("attention_kept",),
)


@functools.cache
def torch_blas() -> int | None:
    """Return the address of the float32 product in torch's own BLAS, or None if it exports none."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(path)).sgemm_, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def has_attention() -> bool:
    """Return whether attention is compiled and loaded, compiling it the first time."""
    return torch_blas() is not None and ATTENTION.available()


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batches, heads, length, width = query.shape
        kv_heads, v_width = key.shape[1], value.shape[3]
        out = allocate((batches, length, heads, v_width), query)
        strides = [t.stride()[:3] for t in (query, key, value, out.transpose(1, 2))]
        sizes = [
            batches,
            heads,
            kv_heads,
            length,
            width,
            v_width,
            PIECE,
            *(step for three in strides for step in three),
        ]
        shape, scale_1 = torch.tensor(sizes, dtype=torch.int64), torch.tensor([scale], dtype=torch.float32)
        kept = allocate((batches * heads * ATTENTION.call("attention_kept", shape),), query)
        inputs = (shape, scale_1, query, key, value, kept)
        ATTENTION.call("attention_forward", torch_blas(), *inputs, out)
        ctx.save_for_backward(*inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inputs = ctx.saved_tensors
        _, _, query, key, value, _ = inputs
        length = query.shape[2]
        outputs = [allocate(t.transpose(1, 2).shape, t) for t in (query, key, value)]
        for grad in outputs[1:]:
            grad.zero_()
        scratch = allocate((torch.get_num_threads() * PIECE * length,), query)
        ATTENTION.call("attention_backward", torch_blas(), *inputs, grads[0].contiguous(), *outputs, scratch)
        return *(grad.transpose(1, 2) for grad in outputs), None


def _supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    tensors = (query, key, value)
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and all(t.stride(3) == 1 and t.stride(2) >= t.shape[3] > 0 for t in tensors)
        and 1 < query.shape[2] == key.shape[2] <= MAX_LENGTH
        and query.shape[1] % key.shape[1] == 0
        and key.shape[1] == value.shape[1]
        and query.numel() > 0
        and has_attention()
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
    """Return softmax(scale q k^T) v, each position over those up to its own: (B, S, H, V); differentiable.

    query: (B, H, S, W), key: (B, G, S, W), value: (B, G, S, V), with G dividing H. None unless all are float32 on a
    CPU with contiguous rows, and there are 2 to MAX_LENGTH positions.
    """
    if not _supported(query, key, value):
        return None
    return _CausalAttention.apply(query, key, value, scale)
