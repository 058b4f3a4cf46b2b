"""DeepSpeed's own expert parallelism (AutoEP): its routers count their load and keep their bias in float32.

AutoEP replaces a model's MoE block with a layer of its own, whose router adds the model's e_score_correction_bias to
the scores before the top-k and never updates it. The layer stays; its router becomes a gate that a Balancer knows. The
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
    """Route by AutoEP's own forward, which returns (weights, expert ids, tokens per expert)."""
    output = gate.family_forward(hidden_states, *args, **kwargs)
    weights_TK, ids_TK, _ = output
    return Routing(output, None, weights_TK, ids_TK, 0)


def _check(name: str, layer: AutoEPMoELayer, group: Group) -> None:
    """Raise ValueError if the layer's bias cannot be updated here, or AutoEP's router would not use it."""
    bias, num_experts = getattr(layer.router, BIAS_NAME), layer.num_experts
    if hasattr(bias, "ds_id") or bias.requires_grad:
        raise ValueError(f"{name}.router.{BIAS_NAME} is a parameter of DeepSpeed's optimizer: make it a buffer")
    if tuple(bias.shape) != (num_experts,):
        raise ValueError(
            f"{name}.router.{BIAS_NAME} has shape {tuple(bias.shape)}, AutoEP's router uses ({num_experts},)"
        )
    handles = layer.folding_group_handles
    if group is None and handles is not None and handles.spec.tp_size > 1:
        raise ValueError(
            f"the {handles.spec.tp_size} ranks of a tensor-parallel group hold the same tokens, which would all be "
            "counted: pass group, the ranks that hold distinct tokens"
        )


def _dropped_bias(model: Any) -> str | None:
    """Return the name of the family's own selection bias, or None; from its configuration, not from the modules."""
    try:
        with torch.device("meta"):
            blocks = list(moe_blocks(type(model)(copy.deepcopy(model.config))))
    except (AttributeError, TypeError):  # not a transformers model
        return "if it has one"
    return next((block.bias_name for block in blocks if not block.added), None)


def _give_biases(model: nn.Module, layers: list[tuple[str, AutoEPMoELayer]]) -> None:
    """Add a bias of 0 to the layers' routers. Raises ValueError if AutoEP dropped the family's own bias."""
    dropped = _dropped_bias(model)
    if dropped is not None:
        raise ValueError(
            f"DeepSpeed's AutoEP dropped the selection bias of {type(model).__name__} ({dropped}), since it copies "
            f"only one called {BIAS_NAME}: use alfb_dist.initialize, which shards and balances the model"
        )
    for _, layer in layers:
        delattr(layer.router, BIAS_NAME)  # None
        device = layer.router.gate.weight.device
        layer.router.register_buffer(BIAS_NAME, torch.zeros(layer.num_experts, device=device))


def watch_autoep(model: nn.Module, group: Group = None) -> list[BalancedGate]:
    """Make the routers of the model's AutoEP layers count their loads, and return them in the model's order.

    In place, idempotent. If no layer has a selection bias, all get one of 0; if some have, only those are returned.
    group: the Balancer's. Raises ValueError if AutoEP dropped the family's own bias, or a bias cannot be updated.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, AutoEPMoELayer)]
    layers = [(name, layer) for name, layer in layers if not isinstance(layer, ShardedExperts)]
    biased = [(name, layer) for name, layer in layers if isinstance(getattr(layer.router, BIAS_NAME, None), Tensor)]
    if layers and not biased:
        _give_biases(model, layers)
        biased = layers
    for name, layer in biased:
        _check(name, layer, group)
    new, batch = [layer.router for _, layer in biased if not isinstance(layer.router, BalancedGate)], Batch()
    for router in new:
        make_balanced(router, _route, BIAS_NAME, router)
        router.batch = batch
        router.bias_E.data = router.bias_E.data.float()
    if new:
        track_batches(model)
    return [layer.router for _, layer in biased]
