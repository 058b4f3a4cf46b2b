"""A family's gate, made to count its load, keep its bias in float32 and carry the auxiliary losses.

The gate keeps its class (as a subclass of it), its parameters and their names, so that a model's state dict and
transformers' own hooks stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from alfb_dist.aux_loss import LossScale, attach, batch_loss, sequence_loss
from alfb_dist.collectives import Group
from alfb_dist.router import RouterSpec, choose_experts, combine_weights, gate_scores


@dataclass
class Batch:
    """What the gates of one model need to know about the micro-batch in its forward; shared by all its gates."""

    shape: tuple[int, int] | None = None  # sequences, positions
    mask_BS: Tensor | None = None  # False on padding; None where nothing is padded
    evaluated_mask_BS: Tensor | None = None  # the same of an evaluation, which a backward still to come must not see
    loss_scale: LossScale = field(default_factory=LossScale)

    def mask_T(self, num_tokens: int, *, evaluated: bool = False) -> Tensor | None:
        """The mask of the forward's tokens in their order. ValueError if it does not fit."""
        mask_BS = self.evaluated_mask_BS if evaluated else self.mask_BS
        if mask_BS is None:
            return None
        if mask_BS.numel() != num_tokens:
            shape = tuple(mask_BS.shape)
            raise ValueError(f"the attention mask {shape} does not have one entry for each of {num_tokens} tokens")
        return mask_BS.flatten()


@dataclass
class AuxLosses:
    """Coefficients of the auxiliary losses, 0 being off, and the ranks over which the batch loss is global."""

    sequence_alpha: float = 0.0
    batch_alpha: float = 0.0
    group: Group = None

    @property
    def on(self) -> bool:
        """Whether any of them takes part."""
        return self.sequence_alpha > 0 or self.batch_alpha > 0

    def __deepcopy__(self, memo: dict[int, Any]) -> AuxLosses:
        """A copied model lives on the same ranks; process groups cannot be copied."""
        return self


class _CommitLoad(torch.autograd.Function):
    """Passes the weights on; its backward adds the load, so a token counts once whatever is recomputed or evaluated."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, gate: BalancedGate, load_E: Tensor) -> Tensor:
        ctx.gate, ctx.load_E = gate, load_E
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.load_E is not None:
            ctx.gate.add_load(ctx.load_E)
        ctx.load_E = None  # a second backward through the same graph (retain_graph) brings no new tokens
        return grads[0], None, None


class BalancedGate(nn.Module):
    """What `balance_gate` mixes into a family's gate class. Not used on its own."""

    weight: Tensor
    spec: RouterSpec | None  # set where our own routing equals the family's bit for bit
    bias_name: str
    batch: Batch
    aux: AuxLosses
    pending_load_E: Tensor | None  # int64: tokens of this rank since the last optimizer step
    measured_load_E: Tensor | None  # int64: tokens of this rank seen by `measure_loads`, or None outside of it

    @property
    def bias_E(self) -> Tensor:
        """The selection bias, float32, shaped as the family keeps it."""
        return getattr(self, self.bias_name)

    def add_load(self, load_E: Tensor) -> None:
        """load_E counts toward the next bias update."""
        self.pending_load_E = load_E if self.pending_load_E is None else self.pending_load_E + load_E

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The family's (logits, weights, expert ids), counted if this forward trains."""
        if self.spec is None:
            output = super().forward(hidden_states, *args, **kwargs)
        else:
            output = self._route(hidden_states, self.spec)
        logits_TE, weights_TK, ids_TK = output
        if self.training and torch.is_grad_enabled():
            return logits_TE, self._observe(logits_TE, weights_TK, ids_TK), ids_TK
        if self.measured_load_E is not None:
            mask_T = self.batch.mask_T(ids_TK.shape[0], evaluated=True)
            self.measured_load_E = self.measured_load_E + self._load(ids_TK, mask_T)
        return output

    def _route(self, hidden_states: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor, Tensor]:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = nn.functional.linear(x_TD.to(torch.float32), self.weight.to(torch.float32))
        scores_TE = gate_scores(logits_TE, spec)
        ids_TK = choose_experts(scores_TE.detach(), self.bias_E, spec)
        return logits_TE, combine_weights(scores_TE, ids_TK, spec), ids_TK

    def _load(self, ids_TK: Tensor, mask_T: Tensor | None) -> Tensor:
        counted = ids_TK if mask_T is None else ids_TK[mask_T]
        return torch.bincount(counted.flatten(), minlength=self.bias_E.numel())

    def _observe(self, logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        mask_T = self.batch.mask_T(ids_TK.shape[0])
        load_E = self._load(ids_TK, mask_T)
        if not weights_TK.requires_grad:  # a frozen router on frozen inputs: its backward has to run all the same
            weights_TK = weights_TK.detach().requires_grad_()
        weights_TK = _CommitLoad.apply(weights_TK, self, load_E)
        if self.aux.on:
            loss = self._aux_loss(logits_TE, mask_T, load_E)
            weights_TK = attach(weights_TK, loss, self.batch.loss_scale)
        return weights_TK

    def _aux_loss(self, logits_TE: Tensor, mask_T: Tensor | None, load_E: Tensor) -> Tensor:
        assert self.spec is not None and self.batch.shape is not None
        scores_TE = gate_scores(logits_TE, self.spec)
        loss = scores_TE.new_zeros(())
        if self.aux.sequence_alpha:
            scores_BSE = scores_TE.unflatten(0, self.batch.shape)
            mask_BS = None if mask_T is None else self.batch.mask_BS
            loss = loss + self.aux.sequence_alpha * sequence_loss(scores_BSE, mask_BS, self.spec.top_k)
        if self.aux.batch_alpha:
            part = batch_loss(scores_TE, mask_T, load_E, self.spec.top_k, self.aux.group)
            loss = loss + self.aux.batch_alpha * part
        return loss

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves and casts everything as asked, except that the bias stays float32 with all its bits."""
        exact = self.bias_E.detach().clone() if self.bias_E.dtype == torch.float32 else None
        super()._apply(fn, recurse)
        if self.bias_E.dtype != torch.float32:
            kept = self.bias_E.float() if exact is None else exact.to(self.bias_E.device)
            self.bias_E.data = kept
        return self


def _same_routing(gate: Any, bias_name: str, spec: RouterSpec) -> bool:
    """Whether our routing gives the gate's logits, weights and ids bit for bit, tried on random weights and biases."""
    generator = torch.Generator().manual_seed(0)
    weight = gate.weight
    num_experts, width = weight.shape
    bias = getattr(gate, bias_name)
    probe = torch.randn(64, width, generator=generator).to(weight.device)
    random = {
        "weight": torch.randn(num_experts, width, generator=generator).to(weight) / width**0.5,
        bias_name: (torch.randn(bias.shape, generator=generator) - 0.5).to(bias.device),
    }
    with torch.no_grad():
        try:
            theirs = functional_call(gate, random, (probe,))
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False  # a gate called in another way keeps its own routing
        logits_TE = nn.functional.linear(probe, random["weight"].float())
        scores_TE = gate_scores(logits_TE, spec)
        ids_TK = choose_experts(scores_TE, random[bias_name], spec)
        ours = logits_TE, combine_weights(scores_TE, ids_TK, spec), ids_TK
    if not (isinstance(theirs, tuple) and len(theirs) == 3):
        return False
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs))


def find_spec(gate: Any, bias_name: str) -> RouterSpec | None:
    """The spec by which our routing equals the gate's own bit for bit, or None if there is none."""
    top_k = getattr(gate, "top_k", None)
    if top_k is None or not isinstance(getattr(gate, "weight", None), Tensor) or gate.weight.device.type == "meta":
        return None
    num_groups = getattr(gate, "num_group", None) or getattr(gate, "n_group", None) or 1
    group_limit = getattr(gate, "topk_group", None) or 1
    scaling = getattr(gate, "routed_scaling_factor", None) or 1.0
    for score in ("sigmoid", "softmax"):
        for normalize in (True, False):
            spec = RouterSpec(top_k, score, num_groups, group_limit, normalize, scaling)
            if _same_routing(gate, bias_name, spec):
                return spec
    return None


def balance_gate(gate: nn.Module, bias_name: str, batch: Batch, aux: AuxLosses) -> BalancedGate:
    """The gate itself, now a BalancedGate: in place, idempotent. Its bias is float32 from here on.

    Raises ValueError if an auxiliary loss is asked for and the gate's scores are not known.
    """
    if not isinstance(gate, BalancedGate):
        spec = find_spec(gate, bias_name)
        name = type(gate).__name__
        gate.__class__ = type(f"Balanced{name}", (BalancedGate, type(gate)), {"__module__": __name__})
        assert isinstance(gate, BalancedGate)
        gate.spec, gate.bias_name = spec, bias_name
        gate.pending_load_E = gate.measured_load_E = None
        gate.bias_E.data = gate.bias_E.data.float()
    if aux.on and gate.spec is None:
        raise ValueError(f"auxiliary losses need the scores of the gate, which {type(gate).__name__} does not show")
    gate.batch, gate.aux = batch, aux
    return gate


@contextmanager
def measure_loads(gates: list[BalancedGate]) -> Iterator[Callable[[], Tensor]]:
    """Within the context, forwards that do not train are counted; call what it yields for this rank's load_LE so far.

    Such loads never reach a bias update. Padding is left out as in training.
    """
    for gate in gates:
        gate.measured_load_E = torch.zeros(gate.bias_E.numel(), dtype=torch.int64, device=gate.bias_E.device)
    try:
        yield lambda: torch.stack([gate.measured_load_E for gate in gates if gate.measured_load_E is not None])
    finally:
        for gate in gates:
            gate.measured_load_E = None
