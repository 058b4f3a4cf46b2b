"""Shard the experts of a transformers MoE model over ranks, in place."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from alfb_dist import cpu
from alfb_dist.distributed.all_to_all import Exchange
from alfb_dist.distributed.collectives import size, world_group
from alfb_dist.distributed.topology import make_grid
from alfb_dist.moe.batch import Batch
from alfb_dist.moe.batch_hooks import track_batches, track_loss_scale
from alfb_dist.moe.families.blocks import MoEBlock, check_supported, moe_blocks
from alfb_dist.moe.families.experts import is_swiglu, why_whole
from alfb_dist.moe.gate import AuxLosses, BalancedGate, balance_gate
from alfb_dist.moe.mixin import mix
from alfb_dist.moe.sharded_experts import ShardedExperts, sharded_experts
from alfb_dist.moe.sharding import Sharding
from alfb_dist.moe.shared_experts import CompiledShared, is_shared_swiglu, shared_name
from alfb_dist.moe.shared_overlap import overlap_shared_experts

Model = TypeVar("Model", bound=nn.Module)


def check_parallelizable(model: nn.Module, ep_degree: int) -> list[MoEBlock]:
    """Return the MoE blocks of a model, possibly on "meta"; raise ValueError if `parallelize` cannot shard them."""
    family, blocks = type(model).__name__, list(moe_blocks(model))
    if sharded_experts(model):
        raise ValueError(f"this {family} is parallelised already")
    check_supported(model)
    if not blocks:
        raise ValueError(f"{family} has no MoE block with a gate that carries a selection bias")
    if size(world_group()) % ep_degree:
        raise ValueError(f"the world size ({size(world_group())}) must be divisible by ep_degree ({ep_degree})")
    seen: set[Any] = set()
    for block in blocks:
        _check_experts(block, seen)
        if block.num_experts % ep_degree:
            raise ValueError(
                f"num_experts ({block.num_experts}) of {block.name} must be divisible by ep_degree ({ep_degree})"
            )
    return blocks


def _check_experts(block: MoEBlock, seen: set[Any]) -> None:
    """Raise ValueError if the block's experts cannot be sharded. seen: the kinds that were tested already."""
    experts = block.module.experts
    kind = type(experts), tuple(p.shape for p in experts.parameters())
    reason = None if kind in seen or is_swiglu(experts) else why_whole(experts)
    seen.add(kind)
    if reason is not None:
        raise ValueError(f"{block.name}.experts ({type(experts).__name__}) {reason}")


def watch(model: nn.Module, aux: AuxLosses | None = None) -> list[BalancedGate]:
    """Let the model's gates count their loads, in place; idempotent. Return the gates in the model's order."""
    gates = [m for m in model.modules() if isinstance(m, BalancedGate)]
    if gates:
        if aux is not None and aux.on:
            raise ValueError("auxiliary losses come with parallelize, which must be called before a Balancer is made")
        return gates
    check_supported(model)
    batch, aux = Batch(), aux or AuxLosses()
    gates = [balance_gate(b.gate, b.bias_name, batch, aux, b.holder) for b in moe_blocks(model)]
    if gates:
        track_batches(model)
    if gates and aux.on:
        track_loss_scale(model)
    return list(dict.fromkeys(gates))  # a gate that two blocks share counts as one


def _compile_shared(block: nn.Module) -> None:
    """Let the block's shared experts run by the compiled kernels, if there are any and the experts are SwiGLU."""
    name = shared_name(block)
    if name is not None and cpu.has_kernels():
        shared = block.get_submodule(name)
        if not isinstance(shared, CompiledShared) and is_shared_swiglu(shared):
            mix(shared, CompiledShared)


def parallelize(
    model: Model,
    *,
    ep_degree: int,
    sequence_loss_alpha: float = 0.0,
    batch_loss_alpha: float = 0.0,
    max_rows: int = 0,
    timeout_seconds: float = 600,
) -> Model:
    """Shard the experts of each MoE block over `ep_degree` ranks, in place, and return the model; collective.

    Rank r keeps experts [p E/P, (p+1) E/P) with P = ep_degree and p = r % P. Only the first dimension of the experts'
    parameters is cut: the names in the state dict stay. Every rank passes the same model. torch.distributed must be
    initialised, except for ep_degree 1 in a single process.

    sequence_loss_alpha: coefficient of DeepSeek-V3's sequence-wise loss (arXiv:2412.19437, equation 17); 0 is off.
    batch_loss_alpha: coefficient of the classical auxiliary loss over the batch of all ranks; 0 is off.
        Both act on the gradients only: the loss that the model returns stays the language model's.
    max_rows: rows that a rank's experts hold at once; more are processed in chunks, which are computed again in the
        backward, so that memory does not grow with the load of the busiest rank. At least ep_degree; 0: no limit.
    timeout_seconds: of every exchange in the groups made here.
    Raises ValueError before any collective: no supported MoE block, sizes that do not divide, or already parallelised.
    """
    sharding = Sharding(
        ep_degree=ep_degree,
        max_rows=max_rows,
        sequence_loss_alpha=sequence_loss_alpha,
        batch_loss_alpha=batch_loss_alpha,
        timeout_seconds=timeout_seconds,
    )
    return shard_model(model, sharding)


def shard_model(model: Model, sharding: Sharding) -> Model:
    """Shard the model's experts in place and return it; collective. See `parallelize`."""
    blocks = check_parallelizable(model, sharding.ep_degree)
    watch(model, AuxLosses(*sharding.alphas, world_group()))
    grid = None
    if world_group() is not None:
        grid = make_grid(sharding.ep_degree, timeout_seconds=sharding.timeout_seconds)
    exchange = None if grid is None else Exchange(grid.ep_group)
    with torch.no_grad():
        for block in blocks:
            experts = ShardedExperts(block.module.experts, grid, exchange, sharding)
            block.module.experts = experts
            _compile_shared(block.module)
            if sharding.ep_degree > 1 and sharding.max_rows == 0:
                experts.shared = overlap_shared_experts(block.module, block.gate)
    return model
