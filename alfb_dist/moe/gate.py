"""A family's gate that counts its load, keeps its bias in float32 and carries the auxiliary losses.

The gate keeps its class (as a subclass of it), its parameters and their names, so that a model's state dict and
transformers' own hooks stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alfb_dist.balance.aux_loss import attach, batch_loss, sequence_loss
from alfb_dist.balance.router import RouterSpec, gate_scores
from alfb_dist.distributed.collectives import Group, all_sum, size
from alfb_dist.moe.batch import Batch
from alfb_dist.moe.families.blocks import num_choices, score_matrix
from alfb_dist.moe.families.probe import probe_router
from alfb_dist.moe.load_count import commit_in_backward
from alfb_dist.moe.mixin import BiasHolder, mix
from alfb_dist.moe.recompute import ReplayedTopK
from alfb_dist.moe.routing import Router, Routing, choose_router
from alfb_dist.profiling import span


@dataclass
class AuxLosses:
    """Coefficients of the auxiliary losses, 0 being off, and the ranks over which the batch loss is global."""

    sequence_alpha: float = 0.0
    batch_alpha: float = 0.0
    group: Group = None

    @property
    def on(self) -> bool:
        """Whether any coefficient is above 0."""
        return self.sequence_alpha > 0 or self.batch_alpha > 0

    def __deepcopy__(self, memo: dict[int, Any]) -> AuxLosses:
        """Return self: a copied model is on the same ranks, and process groups cannot be copied."""
        return self


class _Counted(NamedTuple):
    """What a training forward counted."""

    weights: Tensor  # the routing's; their backward commits the load
    load_E: Tensor  # int64, without padding
    mask_T: Tensor | None  # False on padding; None where nothing is padded


class BalancedGate(nn.Module):
    """Mixin for a family's gate class, see `balance_gate`."""

    router: Router
    spec: RouterSpec | None  # the rule by which the gate's logits become its weights and ids, where it is one of ours
    bias_name: str  # in its holder
    weight_name: str  # of the matrix that gives the logits; "" if there is no such matrix
    batch: Batch
    aux: AuxLosses
    pending_load_E: Tensor | None  # int64: tokens of this rank since the last optimizer step
    measured_load_E: Tensor | None  # int64: tokens of this rank seen by `measure_loads`, or None outside of it

    @property
    def bias_holder(self) -> Any:
        """The module that holds the selection bias: the gate, a part of it, or its block."""
        return self.__dict__.get("_holder", self)

    @property
    def bias_E(self) -> Tensor:
        """The selection bias, float32, shaped as the family keeps it."""
        return getattr(self.bias_holder, self.bias_name)

    def add_load(self, load_E: Tensor) -> None:
        """Add load_E to the load of the next bias update."""
        self.pending_load_E = load_E if self.pending_load_E is None else self.pending_load_E + load_E

    def family_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the family's own forward."""
        return super().forward(*args, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the family's forward returns, and count the tokens if this forward trains or is measured."""
        with span("route"):
            routing = self._route(hidden_states, *args, **kwargs)
            if self.training and torch.is_grad_enabled():
                return self._assemble(routing, self._count(routing))
            if self.measured_load_E is not None:
                mask_T = self.batch.mask_T(len(routing.ids_TK), evaluated=True)
                self.measured_load_E = self.measured_load_E + self._load(routing.ids_TK, mask_T)
            return routing.output

    def _route(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Routing:
        """Route the tokens; a recompute chooses the experts that the first run of its layer chose."""
        recording = self.batch.recording
        with nullcontext() if recording is None else ReplayedTopK(recording, self.bias_E.numel()):
            return self.router(self, hidden_states, *args, **kwargs)

    def _count(self, routing: Routing) -> _Counted:
        """Count the tokens that are no padding."""
        mask_T = self.batch.mask_T(len(routing.ids_TK))
        load_E = self._load(routing.ids_TK, mask_T)
        return _Counted(commit_in_backward(routing.weights, self, load_E), load_E, mask_T)

    def _assemble(self, routing: Routing, counted: _Counted) -> tuple[Any, ...]:
        """Return the family's outputs with the counted weights, which carry the auxiliary losses."""
        weights, at = counted.weights, routing.weights_at
        if self.aux.on:
            weights = attach(weights, self._aux_loss(routing, counted), self.batch.loss_scale)
        return *routing.output[:at], weights, *routing.output[at + 1 :]

    def _load(self, ids_TK: Tensor, mask_T: Tensor | None) -> Tensor:
        counted = ids_TK if mask_T is None else ids_TK[mask_T]
        return torch.bincount(counted.flatten(), minlength=self.bias_E.numel())

    def _aux_loss(self, routing: Routing, counted: _Counted) -> Tensor:
        assert self.spec is not None and routing.logits_TE is not None
        if self.batch.shape is None:
            raise ValueError("the sequence-wise loss needs the batch's shape: call the model with input_ids")
        scores_TE = gate_scores(routing.logits_TE.float(), self.spec)
        loss = scores_TE.new_zeros(())
        if self.aux.sequence_alpha:
            scores_BSE = scores_TE.unflatten(0, self.batch.shape)
            mask_BS = None if counted.mask_T is None else self.batch.mask_BS
            loss = loss + self.aux.sequence_alpha * sequence_loss(scores_BSE, mask_BS, self.spec.top_k)
        if self.aux.batch_alpha:
            total_E, num_ranks = all_sum(counted.load_E, self.aux.group), size(self.aux.group)
            part = batch_loss(scores_TE, counted.mask_T, total_E, self.spec.top_k, num_ranks)
            loss = loss + self.aux.batch_alpha * part
        return loss


def _hold_bias(gate: nn.Module, bias_name: str, holder: Any) -> None:
    """Make the bias, 0 where there is none, a float32 buffer of the holder, which no optimizer will find."""
    bias = getattr(holder, bias_name, None)
    if bias is None:
        bias = torch.zeros(num_choices(gate, None), device=next(gate.parameters()).device)
    if isinstance(bias, nn.Parameter):
        delattr(holder, bias_name)
    if bias_name not in holder._buffers:
        holder.register_buffer(bias_name, bias.detach())
    held = getattr(holder, bias_name)
    held.data = held.data.float()


def balance_gate(
    gate: nn.Module, bias_name: str, batch: Batch, aux: AuxLosses, holder: nn.Module | None = None
) -> BalancedGate:
    """Turn the gate into a BalancedGate with the bias as a float32 buffer, in place, and return it; idempotent.

    holder: the module with the bias, the gate unless given. A gate without a bias gets one of 0, which leaves its
    outputs unchanged. Raises ValueError, before any change, if it does not choose by one top-k, or if an auxiliary loss
    is on and the rule of the gate is none of ours.
    """
    holder = gate if holder is None else holder
    if not isinstance(gate, BalancedGate):
        spec, exact = probe_router(gate, bias_name, holder)
        _check_aux(gate, aux, spec)
        router = choose_router(gate, bias_name, holder, spec if exact else None)
        weight_name = score_matrix(gate, num_choices(gate, getattr(holder, bias_name, None)))
        _hold_bias(gate, bias_name, holder)
        make_balanced(gate, router, bias_name, holder)
        assert isinstance(gate, BalancedGate)
        gate.spec, gate.weight_name = spec, weight_name or ""
    _check_aux(gate, aux, gate.spec)
    gate.batch, gate.aux = batch, aux
    return gate


def make_balanced(gate: Any, router: Router, bias_name: str, holder: Any) -> None:
    """Turn the gate into a `BalancedGate` that routes by `router`, and its holder into a `BiasHolder`."""
    mix(gate, BalancedGate, *([BiasHolder] if holder is gate else []))
    if holder is not gate:
        mix(holder, BiasHolder)
    holder.held_bias = bias_name
    gate.__dict__["_holder"] = holder  # not a submodule: it may be the gate's parent
    gate.router, gate.bias_name, gate.spec, gate.weight_name = router, bias_name, None, ""
    gate.batch, gate.aux = Batch(), AuxLosses()
    gate.pending_load_E = gate.measured_load_E = None


def _check_aux(gate: nn.Module, aux: AuxLosses, spec: RouterSpec | None) -> None:
    if aux.on and spec is None:
        raise ValueError(f"auxiliary losses need the scores of the gate, which {type(gate).__name__} does not show")


@contextmanager
def measure_loads(gates: list[BalancedGate]) -> Iterator[Callable[[], Tensor]]:
    """Count the tokens of forwards that do not train; yields a function that returns this rank's load_LE so far.

    Such loads never reach a bias update. Padding does not count.
    """
    for gate in gates:
        gate.measured_load_E = torch.zeros(gate.bias_E.numel(), dtype=torch.int64, device=gate.bias_E.device)
    try:
        yield lambda: torch.stack([gate.measured_load_E for gate in gates if gate.measured_load_E is not None])
    finally:
        for gate in gates:
            gate.measured_load_E = None
