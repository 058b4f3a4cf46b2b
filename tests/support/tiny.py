"""Tiny DeepSeek-V3 models and batches from a seed, and the whole of what ranks hold in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from alfb_dist.moe.parallelize import watch
from alfb_dist.moe.sharded_experts import sharded_experts

VOCAB, TOP_K = 61, 4
GROUP_LIMITED: dict[str, int] = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}
"""Overrides for `tiny_model`: each token's four experts come from two of four groups of four."""
CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}
"""What `use_reentrant` is in each kind of activation checkpointing."""


def tiny_config(**overrides: Any) -> DeepseekV3Config:
    """One dense layer and two MoE layers of 8 experts, top 4, with 1 shared expert; any key can be overridden."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": TOP_K,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "num_nextn_predict_layers": 0,
        "use_cache": False,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    return DeepseekV3Config(**{**sizes, **overrides})


def tiny_model(seed: int = 0, **config_overrides: Any) -> DeepseekV3ForCausalLM:
    """A model in float32 and training mode with the weights of this seed and biases of 0: the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DeepseekV3ForCausalLM(tiny_config(**config_overrides)).train()


def gates(model: nn.Module) -> list[nn.Module]:
    """The model's gates, in its order."""
    return [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]


def biases(model: nn.Module) -> Tensor:
    """A copy of the selection biases, (L, E)."""
    return torch.stack([g.e_score_correction_bias.detach().clone() for g in gates(model)])


def set_biases(model: nn.Module, bias_LE: Tensor) -> None:
    """The gates have these selection biases, in the model's order."""
    assert len(gates(model)) == len(bias_LE)
    for gate, bias_E in zip(gates(model), bias_LE):
        gate.e_score_correction_bias.data.copy_(bias_E)


def random_biases(model: nn.Module, seed: int, *, low: float = -0.2, high: float = 0.2) -> Tensor:
    """float32 (L, E), uniform in [low, high). Scores lie in (0, 1): high <= -1 makes every biased score negative."""
    shape = (len(gates(model)), gates(model)[0].e_score_correction_bias.numel())
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * uniform


def tiny_batch(
    seed: int, sequences: int, positions: int, vocab: int = VOCAB, *, padding: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """input_ids and labels (B, S) of this seed, to be passed to the model.

    padding: how many positions at the end of each sequence are padding; adds the attention_mask and labels of -100.
    """
    ids = torch.randint(vocab, (sequences, positions), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if padding is not None:
        mask = torch.arange(positions)[None] < positions - torch.tensor(padding)[:, None]
        batch["attention_mask"] = mask.long()
        batch["labels"][~mask] = -100
    return batch


def gate_outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each gate's (logits, weights, expert ids) in an evaluation of the batch."""
    outputs: list[Any] = []
    hooks = [g.register_forward_hook(lambda _, __, output: outputs.append(output)) for g in gates(model)]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return outputs


def expected_load(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """int64 (L, E): how often each expert is chosen by tokens that are no padding, counted one by one."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().tolist()
    load_LE = torch.zeros(len(gates(model)), gates(model)[0].e_score_correction_bias.numel(), dtype=torch.int64)
    for load_E, (_, _, ids_TK) in zip(load_LE, gate_outputs(model, batch)):
        for ids, real in zip(ids_TK.tolist(), mask):
            for i in ids:
                load_E[i] += real
    return load_LE


def part(batch: dict[str, Tensor], index: int, parts: int) -> dict[str, Tensor]:
    """One of the equal parts into which a batch's sequences are cut: what one of `parts` ranks trains on."""
    return {name: x.chunk(parts)[index] for name, x in batch.items()}


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    pieces = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(pieces, x.contiguous(), group=group)
    return torch.cat(pieces)


def _shards(model: nn.Module) -> dict[str, Any]:
    """The grid of every sharded expert parameter, by the parameter's name."""
    return {
        f"{module_name}.{name}": module.grid
        for module_name, module in model.named_modules()
        if getattr(module, "grid", None) is not None
        for name, _ in module.named_parameters()
    }


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that differ between the ranks of an expert-parallel group."""
    return [p for _, experts in sharded_experts(model) for p in experts.parameters()]


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by name, experts gathered to (E, ...) from the expert-parallel group; collective."""
    shards = _shards(model)
    return {
        name: _gathered(p.detach(), shards[name].ep_group) if name in shards else p.detach().clone()
        for name, p in model.named_parameters()
    }


def _summed(tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """The sums over the group, in one all-reduce."""
    flat = torch.cat([x.detach().flatten() for x in tensors.values()])
    if group is not None:
        dist.all_reduce(flat, group=group)
    parts = flat.split([x.numel() for x in tensors.values()])
    return {name: x.view_as(tensors[name]) for name, x in zip(tensors, parts)}


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of the sum of all ranks' losses by parameter name, experts gathered to (E, ...); collective.

    From `param.grad` as the backward left it, before any averaging. KeyError where a gradient is None on this rank.
    """
    shards, parameters = _shards(model), dict(model.named_parameters())
    missing = [name for name, p in parameters.items() if p.grad is None]
    if missing:
        raise KeyError(f"no gradient of {', '.join(missing)}")
    expert = {name: parameters[name].grad for name in parameters if name in shards}
    dense = {name: parameters[name].grad for name in parameters if name not in shards}
    dense = _summed(dense, dist.group.WORLD if dist.is_initialized() else None)
    if expert:
        grid = next(iter(shards.values()))
        expert = {n: _gathered(g, grid.ep_group) for n, g in _summed(expert, grid.expert_data_group).items()}
    return {name: (expert if name in expert else dense)[name] for name in parameters}


def counted_model(seed: int = 0, *, checkpointing: str = "none", **overrides: Any) -> nn.Module:
    """A model with random biases whose gates count."""
    model = tiny_model(seed, **overrides)
    set_biases(model, random_biases(model, seed))
    if CHECKPOINTING[checkpointing] is not None:
        model.activation_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    watch(model)
    return model


def plain_model(seed: int = 0, **overrides: Any) -> nn.Module:
    """transformers' own, with the weights and biases of a counted one."""
    model = tiny_model(seed, **overrides)
    set_biases(model, random_biases(model, seed))
    return model


def train_on(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """A forward and its backward."""
    model(**batch).loss.backward()


def pending(model: nn.Module) -> Tensor:
    """The loads that wait for the next update, zeros where a gate has seen none."""
    zero = torch.zeros(gates(model)[0].bias_E.numel(), dtype=torch.int64)
    loads = [zero if g.pending_load_E is None else g.pending_load_E for g in gates(model)]
    assert all(load_E.dtype == torch.int64 for load_E in loads)
    return torch.stack(loads)


class SharedGate(nn.Module):
    """Two depths of MoE blocks that share one gate of 4 experts, top 1; token i goes to expert i of its one-hot row."""

    def __init__(self) -> None:
        super().__init__()
        config = tiny_config(hidden_size=4, n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=2)
        self.first, self.second = DeepseekV3MoE(config), DeepseekV3MoE(config)
        self.second.gate = self.first.gate
        with torch.no_grad():
            self.first.gate.weight.copy_(5 * torch.eye(4))
            for block in (self.first, self.second):
                for p in block.experts.parameters():
                    nn.init.normal_(p, generator=torch.Generator().manual_seed(0))

    def forward(self, first_SD: Tensor, second_SD: Tensor) -> Tensor:
        return self.first(first_SD[None]).sum() + self.second(second_SD[None]).sum()


def plain_step(
    model: nn.Module, batch: dict[str, Tensor], *, learning_rate: float, rate: float, rule: str = "sign"
) -> dict[str, Tensor]:
    """One step of transformers' own model by hand: choices counted one by one, SGD, the rule written out."""
    load_LE = expected_load(model, batch)
    train_on(model, batch)
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= learning_rate * p.grad
                p.grad = None
    for gate, load in zip(gates(model), load_LE.tolist()):
        for i, n in enumerate(load):
            excess = n - sum(load) / len(load)
            move = (excess > 0) - (excess < 0) if rule == "sign" else excess / sum(load)
            gate.e_score_correction_bias[i] -= rate * move
    return {"load": load_LE, "bias": biases(model)}
