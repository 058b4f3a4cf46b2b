"""A family's gate, made to count its load, keep its bias in float32 and carry the auxiliary losses.

The gate keeps its class (as a subclass of it), its parameters and their names, so that a model's state dict and
transformers' own hooks stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alfb_dist.balance.aux_loss import LossScale, attach, batch_loss, sequence_loss
from alfb_dist.balance.router import RouterSpec, choose_experts, combine_weights, gate_scores
from alfb_dist.distributed.collectives import Group, all_sum, size
from alfb_dist.moe.families.blocks import num_choices, score_matrix
from alfb_dist.moe.families.probe import find_choice, find_rule
from alfb_dist.moe.recompute import Run, SameChoice
from alfb_dist.moe.topk_bias import BiasedChoice, Choice
from alfb_dist.moe.weighing import Commit, Weighing, gate_logits, supported
from alfb_dist.profiling import span


@dataclass
class Batch:
    """What the gates of one model need to know about the micro-batch in its forward; shared by all its gates."""

    shape: tuple[int, int] | None = None  # sequences, positions
    mask_BS: Tensor | None = None  # False on padding; None where nothing is padded
    evaluated_mask_BS: Tensor | None = None  # the same of an evaluation, which a backward still to come must not see
    loss_scale: LossScale = field(default_factory=LossScale)
    run: Run | None = None  # of a checkpointed layer, while it runs

    def noted(self) -> tuple[tuple[int, int] | None, Tensor | None]:
        """What a training forward has noted."""
        return self.shape, self.mask_BS

    def note(self, shape: tuple[int, int] | None, mask_BS: Tensor | None) -> None:
        """A training forward has this shape and mask."""
        self.shape, self.mask_BS = shape, mask_BS

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


class _Counted(NamedTuple):
    commit: Commit  # run by the backward of the weights
    load_E: Tensor  # of all tokens, padding included


class _CommitLoad(torch.autograd.Function):
    """Passes the weights on; its backward commits the load."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, commit: Commit) -> Tensor:
        ctx.commit = commit
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.commit()
        return grads[0], None


class BiasHolder(nn.Module):
    """What is mixed into the class of a module that holds a selection bias. Not used on its own."""

    held_bias: str  # the bias's name in this module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves and casts everything as asked, except that the bias stays float32 with all its bits."""
        bias = getattr(self, self.held_bias)
        exact = bias.detach().clone() if bias.dtype == torch.float32 else None
        super()._apply(fn, recurse)
        bias = getattr(self, self.held_bias)
        if bias.dtype != torch.float32:
            bias.data = bias.float() if exact is None else exact.to(bias.device)
        return self


class BalancedGate(nn.Module):
    """What `balance_gate` mixes into a family's gate class. Not used on its own."""

    spec: RouterSpec | None  # the rule by which the gate's logits become its weights and ids, where it is one of ours
    fast: bool  # whether our routing replaces the family's: also its logits are ours, bit for bit
    bias_name: str  # in its holder
    choice: Choice | None  # how the family's own forward chooses, where it has no bias and ours stands in for it
    weight_name: str  # of the matrix that gives the logits
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
        """load_E counts toward the next bias update."""
        self.pending_load_E = load_E if self.pending_load_E is None else self.pending_load_E + load_E

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The family's (logits, weights, expert ids) and what else it returns, counted if this forward trains."""
        with span("route"):
            return self._counted(hidden_states, *args, **kwargs)

    def _counted(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        counted = None
        with self.same_choice():
            if self.fast:
                output, counted = self._route(hidden_states)
            elif self.choice is None:
                output = super().forward(hidden_states, *args, **kwargs)
            else:
                with BiasedChoice(self.bias_E, of_logits=self.choice.of_logits) as choice:
                    output = super().forward(hidden_states, *args, **kwargs)
        at = 1 if self.choice is None else self.choice.weights_at
        ids_TK = output[2] if self.choice is None else choice.ids_TK
        if self.training and torch.is_grad_enabled():
            return *output[:at], self._observe(output[0], output[at], ids_TK, counted), *output[at + 1 :]
        if self.measured_load_E is not None:
            mask_T = self.batch.mask_T(ids_TK.shape[0], evaluated=True)
            self.measured_load_E = self.measured_load_E + self._load(ids_TK, mask_T)
        return output

    def same_choice(self) -> Any:
        """The context in which a recompute chooses as the first run of its layer did."""
        return nullcontext() if self.batch.run is None else SameChoice(self.batch.run, self.bias_E.numel())

    def _route(self, hidden_states: Tensor) -> tuple[tuple[Tensor, ...], _Counted | None]:
        """The family's outputs, and what else compiled passes gave, where they ran."""
        assert self.spec is not None
        logits_TE = gate_logits(hidden_states, self.get_parameter(self.weight_name))
        scores_TE = gate_scores(logits_TE, self.spec)
        ids_TK = choose_experts(scores_TE.detach(), self.bias_E, self.spec)
        if not supported(scores_TE, self.spec.top_k):
            return (logits_TE, combine_weights(scores_TE, ids_TK, self.spec), ids_TK), None
        commit = Commit(self)
        weights_TK, load_E = Weighing.apply(scores_TE, ids_TK, self.spec, commit)
        return (logits_TE, weights_TK, ids_TK), _Counted(commit, load_E)

    def _load(self, ids_TK: Tensor, mask_T: Tensor | None) -> Tensor:
        counted = ids_TK if mask_T is None else ids_TK[mask_T]
        return torch.bincount(counted.flatten(), minlength=self.bias_E.numel())

    def _observe(
        self, logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor, counted: _Counted | None = None
    ) -> Tensor:
        """The weights, whose backward commits the load."""
        mask_T = self.batch.mask_T(ids_TK.shape[0])
        load_E = self._load(ids_TK, mask_T) if counted is None or mask_T is not None else counted.load_E
        if counted is not None and weights_TK.requires_grad:
            counted.commit.load_E = load_E
        else:
            if not weights_TK.requires_grad:  # a frozen router on frozen inputs: its backward has to run all the same
                weights_TK = weights_TK.detach().requires_grad_()
            weights_TK = _CommitLoad.apply(weights_TK, Commit(self, load_E))
        if self.aux.on:
            loss = self._aux_loss(logits_TE, mask_T, load_E)
            weights_TK = attach(weights_TK, loss, self.batch.loss_scale)
        return weights_TK

    def _aux_loss(self, logits_TE: Tensor, mask_T: Tensor | None, load_E: Tensor) -> Tensor:
        assert self.spec is not None
        if self.batch.shape is None:
            raise ValueError("the sequence-wise loss needs the batch's shape: call the model with input_ids")
        scores_TE = gate_scores(logits_TE.float(), self.spec)
        loss = scores_TE.new_zeros(())
        if self.aux.sequence_alpha:
            scores_BSE = scores_TE.unflatten(0, self.batch.shape)
            mask_BS = None if mask_T is None else self.batch.mask_BS
            loss = loss + self.aux.sequence_alpha * sequence_loss(scores_BSE, mask_BS, self.spec.top_k)
        if self.aux.batch_alpha:
            total_E, num_ranks = all_sum(load_E, self.aux.group), size(self.aux.group)
            part = batch_loss(scores_TE, mask_T, total_E, self.spec.top_k, num_ranks)
            loss = loss + self.aux.batch_alpha * part
        return loss


def mix(module: nn.Module, *mixins: type[nn.Module]) -> None:
    """The module's class is now a subclass of it and of the mixins, so that transformers still knows it."""
    family = type(module)
    module.__class__ = type(f"Balanced{family.__name__}", (*mixins, family), {"__module__": __name__})


def _hold_bias(holder: Any, bias_name: str, bias: Tensor) -> None:
    """The holder has the bias as a float32 buffer, which no optimizer will find."""
    if isinstance(bias, nn.Parameter):
        delattr(holder, bias_name)
    if bias_name not in holder._buffers:
        holder.register_buffer(bias_name, bias.detach())
    held = getattr(holder, bias_name)
    held.data = held.data.float()
    holder.held_bias = bias_name


def balance_gate(
    gate: nn.Module, bias_name: str, batch: Batch, aux: AuxLosses, holder: nn.Module | None = None
) -> BalancedGate:
    """The gate itself, now a BalancedGate: in place, idempotent. Its bias is a float32 buffer from here on.

    holder: the module with the bias, the gate unless given. A gate without a bias gets one of 0, which leaves its
    outputs as they are. Raises ValueError, and changes nothing, if it does not choose by one top-k, or if an auxiliary
    loss is asked for and the rule of the gate is none of ours.
    """
    if not isinstance(gate, BalancedGate):
        spec, fast = find_rule(gate, bias_name, holder or gate)
        _check_aux(gate, aux, spec)
        _make_balanced(gate, bias_name, holder or gate, spec, fast)
        assert isinstance(gate, BalancedGate)
    _check_aux(gate, aux, gate.spec)
    gate.batch, gate.aux = batch, aux
    return gate


def _make_balanced(gate: Any, bias_name: str, holder: nn.Module, spec: RouterSpec | None, fast: bool) -> None:
    bias = getattr(holder, bias_name, None)
    choice = find_choice(gate) if bias is None and not fast else None
    if bias is None and choice is None and not fast:
        raise ValueError(
            f"{type(gate).__name__} has no selection bias and cannot get one: it does not choose by one top-k over its "
            "experts that decides its weights"
        )
    weight_name = score_matrix(gate, num_choices(gate, bias))
    if bias is None:
        bias = torch.zeros(num_choices(gate, None), device=next(gate.parameters()).device)
    _hold_bias(holder, bias_name, bias)
    mix(gate, BalancedGate, *([BiasHolder] if holder is gate else []))
    if holder is not gate:
        mix(holder, BiasHolder)
    gate.__dict__["_holder"] = holder  # not a submodule: it may be the gate's parent
    gate.spec, gate.fast, gate.bias_name, gate.choice = spec, fast, bias_name, choice
    gate.weight_name = weight_name or ""
    gate.pending_load_E = gate.measured_load_E = None


def _check_aux(gate: nn.Module, aux: AuxLosses, spec: RouterSpec | None) -> None:
    if aux.on and spec is None:
        raise ValueError(f"auxiliary losses need the scores of the gate, which {type(gate).__name__} does not show")


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
