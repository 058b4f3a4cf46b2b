"""A transformers MoE model, its experts sharded over ranks in place."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alfb_dist.config.settings import Sharding
from alfb_dist.cpu import experts as native
from alfb_dist.distributed.all_to_all import Exchange
from alfb_dist.distributed.collectives import size, world_group
from alfb_dist.distributed.topology import make_grid
from alfb_dist.moe.families.blocks import MoEBlock, check_done, moe_blocks
from alfb_dist.moe.families.experts import is_swiglu, why_whole
from alfb_dist.moe.gate import AuxLosses, BalancedGate, Batch, balance_gate, mix
from alfb_dist.moe.recompute import remember_runs
from alfb_dist.moe.sharded_experts import ShardedExperts, sharded_experts
from alfb_dist.moe.shared_experts import CompiledShared, is_shared_swiglu, shared_name
from alfb_dist.moe.shared_overlap import shared_to_run_early

Model = TypeVar("Model", bound=nn.Module)


def check_parallelizable(model: nn.Module, ep_degree: int) -> list[MoEBlock]:
    """The model's MoE blocks; ValueError if `parallelize` cannot shard them so. The model may be without memory."""
    family, blocks = type(model).__name__, list(moe_blocks(model))
    if sharded_experts(model):
        raise ValueError(f"this {family} is parallelised already")
    check_done(model)
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
    """ValueError if the block's experts cannot be sharded; each kind is tried once."""
    experts = block.module.experts
    kind = type(experts), tuple(p.shape for p in experts.parameters())
    reason = None if kind in seen or is_swiglu(experts) else why_whole(experts)
    seen.add(kind)
    if reason is not None:
        raise ValueError(f"{block.name}.experts ({type(experts).__name__}) {reason}")


def _first_gate(model: nn.Module) -> BalancedGate:
    """The gate by which a hook finds the batch of the model that it runs in, which may be a copy of the hooked one."""
    return next(m for m in model.modules() if isinstance(m, BalancedGate))


def _around_gates(model: nn.Module, *names: str) -> list[nn.Module]:
    """The modules that hold all the model's gates and whose forward takes arguments of these names, outermost first."""
    gates = {m for m in model.modules() if isinstance(m, BalancedGate)}
    around = [m for m in model.modules() if gates <= set(m.modules())]
    return [m for m in around if set(names) <= set(inspect.signature(m.forward).parameters)]


def _takes_batch(signature: inspect.Signature) -> bool:
    """Whether a forward can be given token ids or a mask; that of a block alone cannot."""
    named = any(name in signature.parameters for name in ("input_ids", "inputs_embeds", "attention_mask"))
    return named or any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _note_batch(model: nn.Module) -> None:
    """Before each forward, the batch's shape and padding are known to the gates, whichever way the model is called.

    They are noted where the token ids and the mask come last together: wrappers and heads around that do not matter.
    An evaluation leaves those of the last training forward. A checkpointed layer is recomputed with those that it had.
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
        batch.note(shape, mask_BS)
        batch.loss_scale.gradient = None

    if _takes_batch(signature):
        innermost.register_forward_pre_hook(before, with_kwargs=True)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing") and any(isinstance(m, BalancedGate) for m in module.modules()):
            module.register_forward_pre_hook(lambda module, _: remember_runs(module, _first_gate(module).batch))


def padding_mask(attention_mask: Any, positions: int | None = None) -> Tensor | None:
    """True on tokens and False on padding, or None if nothing is known to be padded.

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


def _tap_loss(model: nn.Module) -> None:
    """The loss that a model with labels returns tells its scale to the auxiliary losses as its backward starts."""

    def after(module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.requires_grad:
            output.loss = _first_gate(module).batch.loss_scale.of(loss)
        return output

    for module in _around_gates(model, "labels"):
        module.register_forward_hook(after)


def watch(model: nn.Module, aux: AuxLosses | None = None) -> list[BalancedGate]:
    """The model's gates count their loads from now on; in place, idempotent. Its gates, in the model's order."""
    gates = [m for m in model.modules() if isinstance(m, BalancedGate)]
    if gates:
        if aux is not None and aux.on:
            raise ValueError("auxiliary losses come with parallelize, which must be called before a Balancer is made")
        return gates
    check_done(model)
    batch, aux = Batch(), aux or AuxLosses()
    gates = [balance_gate(b.gate, b.bias_name, batch, aux, b.holder) for b in moe_blocks(model)]
    if gates:
        _note_batch(model)
    if gates and aux.on:
        _tap_loss(model)
    return list(dict.fromkeys(gates))  # a gate that two blocks share counts as one


def _compile_shared(block: nn.Module) -> None:
    """The block's shared experts run by the compiled kernels, where there are any and they are of that kind."""
    name = shared_name(block)
    if name is not None and native.library() is not None:
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
    """The same model with the experts of each MoE block sharded over `ep_degree` ranks; in place, collective.

    Rank r keeps experts [p E/P, (p+1) E/P) with P = ep_degree and p = r % P. Only the first dimension of the experts'
    parameters is cut: the names in the state dict stay. Every rank passes the same model. torch.distributed must be up,
    except for ep_degree 1 in a single process.

    sequence_loss_alpha: coefficient of DeepSeek-V3's sequence-wise loss (arXiv:2412.19437, equation 17); 0 is off.
    batch_loss_alpha: coefficient of the classical auxiliary loss over the batch of all ranks; 0 is off.
        Both act on the gradients only: the loss that the model returns stays the language model's.
    max_rows: rows of tokens that a rank's experts hold at once; more come in pieces, which are computed again in the
        backward, so that memory does not follow the busiest rank. At least ep_degree; 0: all at once.
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
                experts.shared = shared_to_run_early(block.module, block.gate)
    return model
