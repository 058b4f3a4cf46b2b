"""Compiled causal attention (cpu/attention.py) in place of transformers' "sdpa" on a CPU.

Torch's own has a fast path only where queries and values are equally wide, which they are not in multi-head latent
attention. Masks, other dtypes, dropout and caches are left to transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from alfb_dist import cpu

NAME = "alfb_causal"
"""The name of this implementation in transformers."""


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
    """Return the output, (B, S, H, V), and no attention weights; transformers calls this."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if attention_mask is None and causal and not dropout and not special:
        out = cpu.causal_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        if out is not None:
            return out, None
    arguments = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    attention: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    return attention


def choose_attention(model: nn.Module) -> bool:
    """Make a model on a CPU use compiled attention in place of "sdpa", if it is compiled; return whether it does."""
    config: Any = getattr(model, "config", None)
    choose: Any = getattr(model, "set_attn_implementation", None)
    if choose is None or getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    if any(p.device.type != "cpu" for p in model.parameters()) or not cpu.has_attention():
        return False

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    choose(NAME)
    return bool(config._attn_implementation == NAME)
