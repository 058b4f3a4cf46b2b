"""The experts' compute on one rank: for each row, the weighted sum of SwiGLU experts over its slots.

`expert_mlp` takes the fastest form for its arguments; `expert_mlp_reference` is the slow, obvious one that tests
compare each with. Rows come in any order; a slot with id e (one past the last local expert) is empty.
"""

from __future__ import annotations

import functools
import logging

from torch import Tensor

from alfb_dist import cpu
from alfb_dist.moe.experts import grouped
from alfb_dist.moe.experts.plain import plain_mlp
from alfb_dist.moe.experts.reference import Activation, expert_mlp_reference, is_silu

__all__ = ["Activation", "expert_mlp", "expert_mlp_reference"]

log = logging.getLogger(__name__)


@functools.cache
def _log_once(form: str) -> None:
    log.info("the experts' compute: %s", form)


def expert_mlp(
    x_RD: Tensor,
    expert_ids_RK: Tensor,
    weights_RK: Tensor,
    gate_up_e2FD: Tensor,
    down_eDF: Tensor,
    act: Activation,
    *,
    num_places: int | None = None,
) -> Tensor:
    """Return for each row the sum over its slots of weight * down(act(gate(x)) * up(x)): (R, D), in x's dtype.

    expert_ids_RK: int64 in [0, e]; e marks an empty slot. weights_RK: at least float32. Sums over slots and the
    gradient of x are at least float32. Differentiable; an expert without rows gets zero gradients, not None.
    num_places: at least the number of filled slots, if the caller knows it: an accelerator then allocates that many
    places rather than R * K.
    """
    out_RD = cpu.expert_mlp(x_RD, expert_ids_RK, weights_RK, gate_up_e2FD, down_eDF) if is_silu(act) else None
    if out_RD is not None:
        _log_once("compiled")
        return out_RD
    if grouped.supported(x_RD, weights_RK, gate_up_e2FD, down_eDF, act):
        kernels = grouped.kernels(x_RD.device.type).__name__.rpartition(".")[2]
        _log_once(f"grouped products with {kernels} between them")
        return grouped.GroupedMLP.apply(x_RD, weights_RK, gate_up_e2FD, down_eDF, expert_ids_RK, num_places)
    _log_once("plain torch, expert by expert")
    return plain_mlp(x_RD, expert_ids_RK, weights_RK, gate_up_e2FD, down_eDF, act)
