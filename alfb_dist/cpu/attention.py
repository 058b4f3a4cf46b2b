"""Causal attention on a CPU in float32 (attention.c), in the place of transformers' "sdpa".

Torch's own has a fast path only where queries and values are equally wide, which they are not in multi-head latent
attention. Whatever this one does not do (masks, other dtypes, dropout, a cache) is left to transformers.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alfb_dist.cpu import allocator as arena
from alfb_dist.cpu.build import load
from alfb_dist.cpu.experts import torch_blas

log = logging.getLogger(__name__)

NAME = "alfb_causal"
"""Of this implementation in transformers."""

PIECE = 64
"""Queries that are worked on at once; each piece meets the keys up to its end, so a small one saves more products."""

LONGEST = 2048
"""Positions up to which the probabilities are kept for the backward: half of length squared, for each head."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had."""
    lib = None if torch_blas() is None else load(Path(__file__).parent / "csrc" / "attention.c")
    if lib is not None:
        lib.attention_kept.restype = ctypes.c_int64
    return lib


def supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `causal_attention` takes these."""
    tensors = (query, key, value)
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and all(t.stride(3) == 1 and t.stride(2) >= t.shape[3] > 0 for t in tensors)
        and 1 < query.shape[2] == key.shape[2] <= LONGEST
        and query.shape[1] % key.shape[1] == 0
        and key.shape[1] == value.shape[1]
        and query.numel() > 0
        and library() is not None
    )


def _address(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        lib = library()
        assert lib is not None
        batches, heads, length, width = query.shape
        kv_heads, v_width = key.shape[1], value.shape[3]
        out = arena.empty((batches, length, heads, v_width), query)
        steps = [t.stride()[:3] for t in (query, key, value, out.transpose(1, 2))]
        sizes = [batches, heads, kv_heads, length, width, v_width, PIECE, *(step for three in steps for step in three)]
        shape, scale_1 = torch.tensor(sizes, dtype=torch.int64), torch.tensor([scale], dtype=torch.float32)
        kept = arena.empty((batches * heads * lib.attention_kept(_address(shape)),), query)
        inputs = (shape, scale_1, query, key, value, kept)
        lib.attention_forward(ctypes.c_void_p(torch_blas()), *map(_address, (*inputs, out)))
        ctx.save_for_backward(*inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        lib, inputs = library(), ctx.saved_tensors
        assert lib is not None
        _, _, query, key, value, _ = inputs
        length = query.shape[2]
        made = [arena.empty(query.transpose(1, 2).shape, query)]
        made += [arena.zeros(t.transpose(1, 2).shape, t) for t in (key, value)]
        scratch = arena.empty((torch.get_num_threads() * PIECE * length,), query)
        tensors = (*inputs, grads[0].contiguous(), *made, scratch)
        lib.attention_backward(ctypes.c_void_p(torch_blas()), *map(_address, tensors))
        return *(grad.transpose(1, 2) for grad in made), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, each position over those up to its own: (B, S, H, V); differentiable.

    query: (B, H, S, W), key: (B, G, S, W), value: (B, G, S, V), with G dividing H, all as `supported` wants them.
    """
    return _CausalAttention.apply(query, key, value, scale)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: (B, S, H, V) and no attention weights."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if attention_mask is None and causal and not dropout and not special and supported(query, key, value):
        return causal_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    arguments = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    attention: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    return attention


def choose_attention(model: nn.Module) -> bool:
    """Whether the model's attention is this one from now on: on CPU, in the place of "sdpa", if compiled."""
    config: Any = getattr(model, "config", None)
    choose: Any = getattr(model, "set_attn_implementation", None)
    if choose is None or getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    if any(p.device.type != "cpu" for p in model.parameters()) or library() is None:
        return False

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    choose(NAME)
    return bool(config._attn_implementation == NAME)
