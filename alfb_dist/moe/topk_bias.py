"""A selection bias for gates that have none: it takes part in the family's own top-k, and in nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from alfb_dist.moe.recompute import top_k_arguments


@dataclass(frozen=True)
class TopKSpec:
    """How a gate without a bias chooses its experts."""

    of_logits: bool
    """Whether its top-k ranks logits, whose softmax is then the score; else it ranks scores."""
    weights_at: int
    """Position in its outputs of the weights, which depend on the choice."""


class BiasedTopK(TorchFunctionMode):
    """Context in which a top-k over as many values as there are biases ranks score + bias and returns unbiased values.

    of_logits: see `TopKSpec`.
    """

    def __init__(self, bias_E: Tensor, *, of_logits: bool) -> None:
        super().__init__()
        self.bias_E, self.of_logits = bias_E, of_logits
        self.ids_TK: Tensor | None = None
        """int64: the experts of the last such top-k."""
        self.ranked_TE: Tensor | None = None
        """Its values, unbiased."""
        self.num_calls = 0
        """Number of top-ks of any kind."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Bias top-ks over the experts and call every other function."""
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **(kwargs or {}))
        self.num_calls += 1
        values, k, dim, largest, in_order = top_k_arguments(*args, **(kwargs or {}))
        if not largest or dim != values.dim() - 1 or values.shape[-1] != self.bias_E.numel():
            return func(*args, **(kwargs or {}))
        scores = values.detach().float()
        if self.of_logits:
            scores = scores.softmax(-1)
        ids = (scores + self.bias_E).topk(k, sorted=in_order)[1]
        self.ids_TK, self.ranked_TE = ids.flatten(0, -2), values.detach().flatten(0, -2)
        return torch.return_types.topk((values.gather(-1, ids), ids))
