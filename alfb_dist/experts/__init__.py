"""What the experts of one rank make of its rows: for each row, the weighted sum over its slots of SwiGLU experts.

`expert_mlp` takes the fastest way there is for its arguments; `expert_mlp_reference` is the slow, obvious one that
tests compare each with. Rows come in any order; a slot with id e (one past the last local expert) is empty.
"""

from __future__ import annotations

from torch import Tensor

from alfb_dist.experts.native import NativeMLP, supported
from alfb_dist.experts.plain import plain_mlp
from alfb_dist.experts.reference import Activation, expert_mlp_reference

__all__ = ["Activation", "expert_mlp", "expert_mlp_reference"]


def expert_mlp(
    x_RD: Tensor, expert_ids_RK: Tensor, weights_RK: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, act: Activation
) -> Tensor:
    """For each row, the sum over its slots of weight * down(act(gate(x)) * up(x)): (R, D), in x's dtype.

    expert_ids_RK: int64 in [0, e]; e marks an empty slot. weights_RK: at least float32. Sums over slots and the
    gradient of x are at least float32. Differentiable; an expert without rows gets zero gradients, not None.
    """
    if supported(x_RD, weights_RK, gate_up_e2FD, down_eDF, act):
        return NativeMLP.apply(x_RD, weights_RK, gate_up_e2FD, down_eDF, expert_ids_RK)
    return plain_mlp(x_RD, expert_ids_RK, weights_RK, gate_up_e2FD, down_eDF, act)
