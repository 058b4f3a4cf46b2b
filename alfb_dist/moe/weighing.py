"""What of a gate is compiled on a CPU: its logits' backward, and all from scores and choices to weights and load.

The latter (routing.c) gives torch's bits. Torch's graph has a dozen operations for it, on a few numbers each: in a
small layer they cost more than the gate's product.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from alfb_dist.balance.router import RouterSpec, combine_weights
from alfb_dist.cpu import allocator as arena
from alfb_dist.cpu import experts as native
from alfb_dist.cpu.build import load
from alfb_dist.moe.families.probe import float32_logits


class CountsLoad(Protocol):
    """What loads are added to."""

    def add_load(self, load_E: Tensor) -> None:
        """load_E counts toward the next bias update."""


@dataclass
class Commit:
    """A load that counts when the backward of its forward runs: once, whatever is recomputed or evaluated."""

    gate: CountsLoad
    load_E: Tensor | None = None

    def __call__(self) -> None:
        if self.load_E is not None:
            self.gate.add_load(self.load_E)
        self.load_E = None  # a second backward through the same graph (retain_graph) brings no new tokens


class _Logits(torch.autograd.Function):
    """A product whose bits decide on experts, so torch's own; the backward is by the experts' kernels."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD.contiguous(), weight_ED.contiguous())
        return functional.linear(x_TD, weight_ED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x_TD, weight_ED = ctx.saved_tensors
        x_needs, weight_needs = ctx.needs_input_grad
        grad_x_TD = arena.empty(x_TD.shape, x_TD) if x_needs else None
        grad_weight_ED = torch.empty_like(weight_ED) if weight_needs else None
        sizes = (len(x_TD), *weight_ED.shape)
        native.call("linear_backward", *sizes, x_TD, weight_ED, grads[0].contiguous(), grad_x_TD, grad_weight_ED)
        return grad_x_TD, grad_weight_ED


def gate_logits(hidden_states: Tensor, weight_ED: Tensor) -> Tensor:
    """`float32_logits`, to the bit: (T, E)."""
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    if native.traced() or not native.readable(x_TD, weight_ED):
        return float32_logits(x_TD, weight_ED)
    return _Logits.apply(x_TD, weight_ED)


@functools.cache
def library() -> Any:
    """The compiled passes, or None where they cannot be had."""
    lib = load(Path(__file__).parents[1] / "cpu" / "csrc" / "routing.c", exact=True)
    for name, pointers in (("weigh", 5), ("weigh_backward", 4)) if lib else ():
        getattr(lib, name).argtypes = [*[ctypes.c_int64] * 5, ctypes.c_float, *[ctypes.c_void_p] * pointers]
        getattr(lib, name).restype = None
    return lib


class Weighing(torch.autograd.Function):
    """(`combine_weights`, load_E) where it is `supported`; the backward also runs commit, if there is one."""

    @staticmethod
    def forward(
        ctx: Any, scores_TE: Tensor, ids_TK: Tensor, spec: RouterSpec, commit: Commit | None, beside: int | None = None
    ) -> tuple[Tensor, Tensor]:
        scores_TE, ids_TK = scores_TE.contiguous(), ids_TK.contiguous()
        chosen_TK, weights_TK = scores_TE.new_empty(ids_TK.shape), scores_TE.new_empty(ids_TK.shape)
        load_E = ids_TK.new_empty(scores_TE.shape[1])
        beside = beside or sums_beside(ids_TK.shape[1])
        how = (*scores_TE.shape, ids_TK.shape[1], beside, spec.normalize, spec.scaling)
        library().weigh(*how, *(t.data_ptr() for t in (scores_TE, ids_TK, chosen_TK, weights_TK, load_E)))
        ctx.save_for_backward(ids_TK, chosen_TK)
        ctx.how, ctx.commit = how, commit
        ctx.mark_non_differentiable(load_E)
        return weights_TK, load_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights_TK: Tensor, _: Any) -> Any:
        if ctx.commit is not None:
            ctx.commit()
        ids_TK, chosen_TK = ctx.saved_tensors
        grad_TE = chosen_TK.new_empty(ctx.how[:2])
        tensors = (ids_TK, chosen_TK, grad_weights_TK.contiguous(), grad_TE)
        library().weigh_backward(*ctx.how, *(t.data_ptr() for t in tensors))
        return grad_TE, None, None, None, None


@functools.cache
def sums_beside(top_k: int) -> int:
    """How many sums torch takes side by side of so many numbers, 1 or 4; 0 if it does otherwise.

    Tried, with everything around it: it depends on the processor.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    scores_TE, grad_TK = (torch.rand(64, n, generator=generator) for n in (2 * top_k, top_k))
    ids_TK = torch.rand(64, 2 * top_k, generator=generator).argsort()[:, :top_k].contiguous()
    spec = RouterSpec(top_k, scaling=2.5)

    def results(weigh: Any, *how: Any) -> list[Tensor]:
        with torch.enable_grad():
            leaf_TE = scores_TE.clone().requires_grad_()
            weights_TK = weigh(leaf_TE, ids_TK, spec, *how)
            return [weights_TK.detach(), *torch.autograd.grad(weights_TK, leaf_TE, grad_TK)]

    torchs = results(combine_weights)
    for beside in (1, 4) if top_k >= 4 else (1,):
        ours = results(lambda *given: Weighing.apply(*given)[0], None, beside)
        if all(torch.equal(a, b) for a, b in zip(ours, torchs)):
            return beside
    return 0


def supported(scores_TE: Tensor, top_k: int) -> bool:
    """Whether `Weighing` gives the bits of `combine_weights`: float32 on a CPU, kernels at hand, a known order."""
    return scores_TE.is_cpu and scores_TE.dtype == torch.float32 and library() is not None and sums_beside(top_k) > 0
