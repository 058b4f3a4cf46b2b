"""A family's own experts module, run on a part of its experts, for experts other than SwiGLU."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from alfb_dist.moe.experts.reference import Activation, expert_mlp_reference

CPU = torch.device("cpu")
"""The device of trials, also while a model is built without memory."""


def activation(experts: Any) -> Activation | None:
    """Return the activation of SwiGLU experts, a module, or None if there is none."""
    act = getattr(experts, "act_fn", None)
    if act is functional.silu:
        return nn.SiLU()
    return act if callable(act) else None


def expert_rows(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that hold one row for each expert, by name."""
    return dict(experts.named_parameters(recurse=False))


def count_experts(experts: nn.Module) -> int:
    """Return the number of experts with weights. Rows of a parameter beyond them are never read."""
    rows = [p.shape[0] for p in expert_rows(experts).values()]
    return min(rows) if rows else len(list(experts.children()))


def part_of(experts: nn.Module, owner: nn.Module, num_local: int) -> Any:
    """Return a copy of the family's module for `num_local` experts, which shares the parameters of `owner`."""
    part: Any = copy.copy(experts)
    full = count_experts(experts)
    surplus = max(p.shape[0] for p in expert_rows(experts).values()) - full
    for name, value in vars(experts).items():
        if "expert" in name and type(value) is int and value == full:
            part.__dict__[name] = num_local
        elif "expert" in name and type(value) is int and surplus and value == full + surplus:
            part.__dict__[name] = num_local + 1  # experts without weights follow those with: here the empty slot
    part.__dict__["_parameters"], part.__dict__["_modules"] = owner._parameters, owner._modules
    return part


def _replica(experts: nn.Module, parameters: dict[str, Tensor]) -> Any:
    """Return the family's module with other weights, one expert for each of their rows."""
    owner = nn.Module()
    owner._modules = experts._modules
    for name, weight in parameters.items():
        owner.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return part_of(experts, owner, next(iter(parameters.values())).shape[0])


def takes_rows(experts: nn.Module) -> bool:
    """Whether the module takes nothing but rows, already weighted and equally many for each expert (Llama 4)."""
    return len(inspect.signature(type(experts).forward).parameters) == 2


def _in_rows(part: Any, x_RD: Tensor, expert_ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """Return the weighted sums over the slots by a module that takes rows, padded with zeros for each expert."""
    num_experts, (num_rows, top_k) = count_experts(part), expert_ids_RK.shape
    ids_S = expert_ids_RK.flatten()
    order_S = ids_S.argsort(stable=True)
    sizes_e = torch.bincount(ids_S, minlength=num_experts)
    place_S = torch.arange(ids_S.numel(), device=ids_S.device) - (sizes_e.cumsum(0) - sizes_e)[ids_S[order_S]]
    x_emD = x_RD.new_zeros(num_experts, int(sizes_e.max()), x_RD.shape[1])
    x_emD = x_emD.index_put((ids_S[order_S], place_S), x_RD.repeat_interleave(top_k, 0)[order_S])
    out_SD = part(x_emD.flatten(0, 1)).view_as(x_emD)[ids_S[order_S], place_S]
    out_SD = out_SD[order_S.argsort()] * weights_RK.reshape(-1, 1).to(out_SD.dtype)
    return out_SD.view(num_rows, top_k, -1).sum(1)


def _called(part: Any, *inputs: Tensor) -> Any:
    return _in_rows(part, *inputs) if takes_rows(part) else part(*inputs)


def _eager(part: Any, *inputs: Tensor) -> Any:
    """Run the module's own forward, whatever implementation its configuration names."""
    return _in_rows(part, *inputs) if takes_rows(part) else inspect.unwrap(type(part).forward)(part, *inputs)


FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)
"""Exceptions of a module that is called in a way that it was not made for."""


@torch.no_grad()
def is_swiglu(experts: nn.Module) -> bool:
    """Whether the experts are SwiGLU experts in transformers' fused form, (E, 2F, D) and (E, D, F), without biases,
    clamp or cast. Tested on small random weights and large values."""
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    act = activation(experts)
    if act is None or not (
        isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.dim() == down.dim() == 3
    ):
        return False
    names = {name for name, _ in experts.named_parameters()}
    if names != {"gate_up_proj", "down_proj"} or down.shape[1:] != (gate_up.shape[2], gate_up.shape[1] // 2):
        return False
    generator = torch.Generator(CPU).manual_seed(0)
    gate_up = torch.randn(4, 6, 5, generator=generator, device=CPU, dtype=torch.float64) * 3
    down = torch.randn(4, 5, 3, generator=generator, device=CPU, dtype=torch.float64)
    x = torch.randn(9, 5, generator=generator, device=CPU, dtype=torch.float64) * 5
    weights = torch.rand(9, 2, generator=generator, device=CPU, dtype=torch.float64)
    ids = torch.rand(9, 4, generator=generator, device=CPU).topk(2).indices
    try:
        theirs = _eager(_replica(experts, {"gate_up_proj": gate_up, "down_proj": down}), x, ids, weights)
        ours = expert_mlp_reference(x, ids, weights, gate_up, down, act)
    except FAILURES:
        return False
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def why_whole(experts: nn.Module) -> str | None:
    """Return why the experts cannot run in parts, to follow their name; None if they can. Tested on random rows."""
    parameters = expert_rows(experts)
    if not parameters:
        return "are not fused SwiGLU experts (gate_up_proj, down_proj)"
    rows = {p.shape[0] for p in parameters.values()}
    if len(rows) > 1 or len(parameters) < sum(1 for _ in experts.parameters()):
        return "have parameters that do not hold one row for each expert"
    generator = torch.Generator(CPU).manual_seed(0)
    two = {
        n: torch.randn(2, *p.shape[1:], generator=generator, device=CPU) / p.shape[-1] ** 0.5
        for n, p in parameters.items()
    }
    ids = torch.tensor([[0, 1], [1, 0], [0, 1]], device=CPU)
    weights = torch.rand(3, 2, generator=generator, device=CPU) + 0.1
    try:
        for width in sorted({size for p in parameters.values() for size in p.shape[1:]}):
            x = torch.randn(3, width, generator=generator, device=CPU)
            whole = _tried(_replica(experts, two), x, ids, weights)
            if whole is not None:
                parts = [_replica(experts, {n: w[i : i + 1] for n, w in two.items()}) for i in range(2)]
                sums = [_filled_slots(p, x, (ids != i).long(), weights * (ids == i)) for i, p in enumerate(parts)]
                same = torch.allclose(sums[0] + sums[1], whole, rtol=1e-3, atol=1e-4)
                return None if same else "give another sum when they run in parts"
    except FAILURES as e:
        return f"cannot run in parts ({type(e).__name__}: {e})"
    return "cannot run on random weights"


def _tried(experts: Any, *inputs: Tensor) -> Tensor | None:
    """Return the experts' output, or None if the inputs have the wrong width."""
    try:
        return _eager(experts, *inputs)
    except FAILURES:
        return None


class _Join(torch.autograd.Function):
    """The identity of both; their gradients come together, so that all ranks exchange them in the same order."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weights_RK: Tensor) -> tuple[Tensor, Tensor]:
        return x_RD.view_as(x_RD), weights_RK.view_as(weights_RK)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads


class _Tie(torch.autograd.Function):
    """The identity of the first; all others get a gradient, 0 where nothing else gives one."""

    @staticmethod
    def forward(ctx: Any, out_RD: Tensor, *tied: Tensor) -> Tensor:
        ctx.tied = [(t.shape, t.dtype, t.device) for t in tied]
        return out_RD.view_as(out_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        zeros = [
            torch.zeros((), dtype=dtype, device=device).expand(shape) if needed else None
            for (shape, dtype, device), needed in zip(ctx.tied, ctx.needs_input_grad[1:])
        ]
        return grads[0], *zeros


def _filled_slots(part: Any, x_RD: Tensor, expert_ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """Return the sum over the filled slots. Some families know no empty slot, so filled ones are passed singly."""
    num_local = count_experts(part)
    row_S, slot_S = (expert_ids_RK < num_local).nonzero(as_tuple=True)
    if row_S.numel() == expert_ids_RK.numel():
        return _called(part, x_RD, expert_ids_RK, weights_RK) if x_RD.numel() else x_RD.clone()
    out_RD = x_RD.new_zeros(x_RD.shape, dtype=torch.promote_types(x_RD.dtype, torch.float32))
    if row_S.numel():
        ids_S1, weights_S1 = expert_ids_RK[row_S, slot_S, None], weights_RK[row_S, slot_S, None]
        out_SD = _called(part, x_RD.index_select(0, row_S), ids_S1, weights_S1)
        out_RD = out_RD.index_add(0, row_S, out_SD.to(out_RD.dtype))
    return out_RD.to(x_RD.dtype)


def family_mlp(part: Any, x_RD: Tensor, expert_ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """Return what `expert_mlp` does, by the family's module. An expert without rows gets zero gradients."""
    x_RD, weights_RK = _Join.apply(x_RD, weights_RK)
    out_RD = _filled_slots(part, x_RD, expert_ids_RK, weights_RK)
    return _Tie.apply(out_RD, x_RD, weights_RK, *part.parameters())
