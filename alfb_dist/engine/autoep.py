"""The seam to DeepSpeed's own expert parallelism: its routers, made to count their load and keep their bias exact.

AutoEP puts a layer of its own in the place of a model's MoE block. Its router adds the model's e_score_correction_bias
to the scores that choose, and never moves it. The layer stays; its router becomes a gate that a Balancer knows. The
router of a family without a bias gets one of 0.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn

from alfb_dist.distributed.collectives import Group
from alfb_dist.moe.batch import Batch
from alfb_dist.moe.batch_hooks import track_batches
from alfb_dist.moe.families.blocks import moe_blocks
from alfb_dist.moe.gate import BalancedGate, make_balanced
from alfb_dist.moe.routing import Routing
from alfb_dist.moe.sharded_experts import ShardedExperts

BIAS_NAME = "e_score_correction_bias"


def _route(gate: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Routing:
    """AutoEP's own routing, which returns (weights, expert ids, tokens per expert)."""
    output = gate.family_forward(hidden_states, *args, **kwargs)
    weights_TK, ids_TK, _ = output
    return Routing(output, None, weights_TK, ids_TK, 0)


def _check(name: str, layer: AutoEPMoELayer, group: Group) -> None:
    """Nothing, or ValueError if no bias that AutoEP's router would use can be moved here."""
    bias, num_experts = getattr(layer.router, BIAS_NAME), layer.num_experts
    if hasattr(bias, "ds_id") or bias.requires_grad:
        raise ValueError(f"{name}.router.{BIAS_NAME} is a parameter of DeepSpeed's optimizer; make it a buffer")
    if tuple(bias.shape) != (num_experts,):
        raise ValueError(
            f"{name}.router.{BIAS_NAME} has shape {tuple(bias.shape)}, AutoEP's router uses ({num_experts},)"
        )
    handles = layer.folding_group_handles
    if group is None and handles is not None and handles.spec.tp_size > 1:
        raise ValueError(
            f"the {handles.spec.tp_size} ranks of a tensor-parallel group hold the same tokens, which would count as "
            "many times: give group, the ranks that hold distinct tokens"
        )


def _dropped_bias(model: Any) -> str | None:
    """The name of the selection bias that the model's family has, None if it has none. The model may be converted."""
    try:
        with torch.device("meta"):
            blocks = list(moe_blocks(type(model)(copy.deepcopy(model.config))))
    except (AttributeError, TypeError):  # no model of transformers
        return "if it has one"
    return next((block.bias_name for block in blocks if not block.added), None)


def _give_biases(model: nn.Module, layers: list[tuple[str, AutoEPMoELayer]]) -> None:
    """The layers' routers have a bias of 0; ValueError if their family has one of its own, which AutoEP dropped."""
    dropped = _dropped_bias(model)
    if dropped is not None:
        raise ValueError(
            f"DeepSpeed's AutoEP dropped the selection bias of {type(model).__name__} ({dropped}), since it copies "
            f"one called {BIAS_NAME} only. alfb_dist.initialize shards and balances the model"
        )
    for _, layer in layers:
        delattr(layer.router, BIAS_NAME)  # None
        device = layer.router.gate.weight.device
        layer.router.register_buffer(BIAS_NAME, torch.zeros(layer.num_experts, device=device))


def watch_autoep(model: nn.Module, group: Group = None) -> list[BalancedGate]:
    """The routers of the model's AutoEP layers count their loads from now on, in the model's order; [] if it has none.

    In place, idempotent. Where no layer has a selection bias, all get one of 0; where some have, the others are passed
    over. Raises ValueError if AutoEP dropped the family's own bias, or if one cannot be moved. group: what the Balancer
    was given.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, AutoEPMoELayer)]
    layers = [(name, layer) for name, layer in layers if not isinstance(layer, ShardedExperts)]
    biased = [(name, layer) for name, layer in layers if isinstance(getattr(layer.router, BIAS_NAME, None), Tensor)]
    if layers and not biased:
        _give_biases(model, layers)
        biased = layers
    for name, layer in biased:
        _check(name, layer, group)
    fresh, batch = [layer.router for _, layer in biased if not isinstance(layer.router, BalancedGate)], Batch()
    for router in fresh:
        make_balanced(router, _route, BIAS_NAME, router)
        router.batch = batch
        router.bias_E.data = router.bias_E.data.float()
    if fresh:
        track_batches(model)
    return [layer.router for _, layer in biased]
