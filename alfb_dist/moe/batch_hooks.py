"""Hooks on a model that give its gates the shape and padding of each micro-batch, and the scale of its loss."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from alfb_dist.moe.gate import BalancedGate
from alfb_dist.moe.recompute import replay_checkpoints


def _first_gate(model: nn.Module) -> BalancedGate:
    """Return a gate with the batch of the model in which a hook runs, which may be a copy of the hooked one."""
    return next(m for m in model.modules() if isinstance(m, BalancedGate))


def _around_gates(model: nn.Module, *names: str) -> list[nn.Module]:
    """Return the modules that hold all the model's gates and whose forward takes these arguments, outermost first."""
    gates = {m for m in model.modules() if isinstance(m, BalancedGate)}
    around = [m for m in model.modules() if gates <= set(m.modules())]
    return [m for m in around if set(names) <= set(inspect.signature(m.forward).parameters)]


def _takes_batch(signature: inspect.Signature) -> bool:
    """Whether a forward can take token ids or a mask, unlike that of a single block."""
    named = any(name in signature.parameters for name in ("input_ids", "inputs_embeds", "attention_mask"))
    return named or any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def track_batches(model: nn.Module) -> None:
    """Set the batch of the model's gates before each forward, whichever way the model is called.

    The hook is on the innermost module that takes both token ids and mask: wrappers and heads around it do not matter.
    An evaluation leaves the batch of the last training forward. A checkpointed layer is recomputed with its own batch.
    """
    innermost = ([model, *_around_gates(model, "input_ids", "attention_mask")])[-1]
    signature = inspect.signature(innermost.forward)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        gate, given = _first_gate(module), signature.bind_partial(*args, **kwargs).arguments
        batch, given = gate.batch, {**given, **given.get("kwargs", {})}
        inputs = next((given[k] for k in ("input_ids", "inputs_embeds") if given.get(k) is not None), None)
        shape = None if inputs is None else (inputs.shape[0], inputs.shape[1])
        mask_BS = padding_mask(given.get("attention_mask"), None if shape is None else shape[1])
        if not (gate.training and torch.is_grad_enabled()):
            batch.evaluated_mask_BS = mask_BS
            return
        batch.shape, batch.mask_BS = shape, mask_BS
        batch.loss_scale.gradient = None

    if _takes_batch(signature):
        innermost.register_forward_pre_hook(before, with_kwargs=True)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing") and any(isinstance(m, BalancedGate) for m in module.modules()):
            module.register_forward_pre_hook(lambda module, _: replay_checkpoints(module, _first_gate(module).batch))


def padding_mask(attention_mask: Any, positions: int | None = None) -> Tensor | None:
    """Return True on tokens and False on padding, (B, S), or None if nothing is known to be padded.

    A (B, S) mask marks padding with 0. One with more columns than the batch has positions begins with those of a cache
    or of a learned prefix, which are not routed: the last ones count. Other forms (4-D masks, mask objects) say who
    attends to whom, not what is padding, and every token counts.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    if positions is not None:
        attention_mask = attention_mask[:, -positions:]
    mask_BS = attention_mask != 0
    return None if bool(mask_BS.all()) else mask_BS


def track_loss_scale(model: nn.Module) -> None:
    """Pass the scale of the loss that a model with labels returns to the auxiliary losses, as its backward starts."""

    def after(module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.requires_grad:
            output.loss = _first_gate(module).batch.loss_scale.of(loss)
        return output

    for module in _around_gates(model, "labels"):
        module.register_forward_hook(after)
