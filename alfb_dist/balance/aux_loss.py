"""The two auxiliary losses, both off by default: DeepSeek-V3's sequence-wise complement and the classical baseline.

They reach the router as gradients: `attach` hands a loss its gradient while the weights' own gradient passes through.
That works under every kind of activation checkpointing, and leaves the reported training loss comparable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def sequence_loss(scores_BSE: Tensor, mask_BS: Tensor | None, top_k: int) -> Tensor:
    """Return the mean over sequences of sum_i f_i P_i, a scalar with gradient through P, without alpha.

    f_i = E / (K S) * tokens of the sequence whose top-k of s, without the bias, contains expert i; P_i = the sequence's
    mean of s_i / sum_j s_j. mask_BS: False on padding, which counts nowhere; a sequence of only padding counts as 0.
    Source: arXiv:2412.19437, equations 17 to 20.
    """
    _, positions, num_experts = scores_BSE.shape
    share_BSE = scores_BSE / scores_BSE.sum(-1, keepdim=True)
    chosen_BSE = torch.zeros_like(share_BSE).scatter_(-1, scores_BSE.topk(top_k, dim=-1)[1], 1.0)
    if mask_BS is None:
        tokens_B1: Tensor | int = positions
    else:
        share_BSE, chosen_BSE = share_BSE * mask_BS[..., None], chosen_BSE * mask_BS[..., None]
        tokens_B1 = mask_BS.sum(-1, keepdim=True).clamp(min=1)
    f_BE = chosen_BSE.sum(1) * (num_experts / top_k) / tokens_B1
    return (f_BE * share_BSE.sum(1) / tokens_B1).sum(-1).mean()


def batch_loss(scores_TE: Tensor, mask_T: Tensor | None, load_E: Tensor, top_k: int, num_ranks: int = 1) -> Tensor:
    """Return this rank's part of sum_i f_i P_i over the batch of all ranks, a scalar, without alpha.

    f_i = E / (K T) * load_i and P_i = the mean of s_i, both over the T unpadded tokens of every rank.
    load_E: int64, the unpadded load summed over num_ranks ranks. Averaging the gradients of all ranks gives the
    gradient of the loss over the whole batch, also where ranks hold different numbers of tokens.
    Source: arXiv:2408.15664, equation 2.
    """
    tokens = (load_E.sum() // top_k).clamp(min=1).to(scores_TE.dtype)
    f_E = load_E.to(scores_TE.dtype) * (scores_TE.shape[-1] / top_k) / tokens
    masked_TE = scores_TE if mask_T is None else scores_TE * mask_T[:, None]
    return (f_E * masked_TE.sum(0)).sum() / tokens * num_ranks


@dataclass
class LossScale:
    """The gradient with which the backward of the model's loss starts: any loss scale over the accumulation steps."""

    gradient: Tensor | None = field(default=None)

    def of(self, loss: Tensor) -> Tensor:
        """Return the loss with a backward that sets the scale before it reaches any router."""
        return _SetScale.apply(loss, self)


class _SetScale(torch.autograd.Function):
    """The identity; its backward keeps the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: LossScale) -> Tensor:
        ctx.scale = scale
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.scale.gradient = grads[0].detach()
        return grads[0], None


class _Attach(torch.autograd.Function):
    """The identity of the weights; the auxiliary loss gets the scale as its gradient."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, loss: Tensor, scale: LossScale) -> Tensor:
        ctx.scale, ctx.dtype = scale, loss.dtype
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.scale.gradient is None:
            raise RuntimeError(
                "an auxiliary loss is scaled with the model's own loss, but the backward did not start from it: "
                "call the model with labels and use the loss that it returns"
            )
        return grads[0], ctx.scale.gradient.to(ctx.dtype), None


def attach(weights_TK: Tensor, loss: Tensor, scale: LossScale) -> Tensor:
    """Return the weights with a backward that also runs the loss's, scaled as the model's own loss.

    The backward raises RuntimeError if it did not start from the model's loss.
    """
    return _Attach.apply(weights_TK, loss, scale)
