"""A limit on the rows that a rank's experts hold at once, wherever the router sends the tokens.

Beyond it, tokens are processed in chunks, each computed again in the backward: memory does not grow with the load of
the busiest rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alfb_dist.distributed.all_to_all import Exchange
from alfb_dist.moe.permute import destinations

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_TD, expert_ids_TK, weights_TK) -> (T, D), row by row; collective."""


def in_chunks(
    max_rows: int,
    compute: Compute,
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    num_local_experts: int,
    exchange: Exchange | None,
) -> Tensor:
    """Return compute(x_TD, ...), with at most max_rows rows on any rank of the group at once; collective.

    max_rows: at least the number of ranks. Where all tokens fit, they are computed at once. In chunks the result is the
    same; sums in the gradients of weights are taken in another order.
    """
    num_ranks = 1 if exchange is None else exchange.num_ranks
    num_tokens = x_TD.shape[0]
    if exchange is None or num_ranks == 1:
        most_tokens = busiest = num_tokens
    else:
        rows_P = destinations(expert_ids_TK, num_local_experts, num_ranks).sum(1).tolist()
        tokens, *rows = zip(*exchange.all_gather([num_tokens, *rows_P], x_TD.device))
        most_tokens, busiest = max(tokens), max(map(sum, rows))
    if busiest <= max_rows:
        return compute(x_TD, expert_ids_TK, weights_TK)
    chunk = max_rows // num_ranks  # tokens of each rank: if all went to one rank, it would get max_rows
    outputs = []
    for start in range(0, most_tokens, chunk):
        inputs = (t[start : start + chunk] for t in (x_TD, expert_ids_TK, weights_TK))
        if torch.is_grad_enabled():
            outputs.append(checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(compute(*inputs))
    return torch.cat(outputs)
