"""A tiny configuration of every family of MoE language models that is supported, and models and batches from a seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from alfb_dist.moe.families.blocks import moe_blocks

VOCAB = 61
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_nextn_predict_layers": 0,
}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
INDEXER: dict[str, Any] = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
EIGHT: dict[str, Any] = {"num_experts": 8}

LAYERS: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse"]}
KDA: dict[str, Any] = {"linear_head_dim": 8, "linear_num_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8}
KDA |= {"qk_rope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16, "num_experts_per_token": 2, "num_experts": 8}

NEXT: dict[str, Any] = {
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {**EIGHT, "num_dense_layers": 1, "num_shared_experts": 1},
    "axk1": {**MLA, **DEEPSEEK},
    "axk2": {**MLA, **DEEPSEEK, **INDEXER, **LAYERS, "gated_norm_rank": 4},
    "bailing_hybrid": {**KDA, **LAYERS, "num_expert_group": 2, "topk_group": 1, "num_nextn_predict_layers": 0},
    "beam": {**EIGHT, **LAYERS, "n_group": 2, "topk_group": 1},
    "deepseek_v3": {**MLA, **DEEPSEEK},
    "deepseek_v32": {**MLA, **DEEPSEEK, **INDEXER},
    "deepseek_v4": {
        **DEEPSEEK,
        **INDEXER,
        "mlp_layer_types": ["hash_moe", "moe"],
        "layer_types": ["sliding_attention", "sliding_attention"],
        "num_key_value_heads": 1,
        "q_lora_rank": 16,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 8,
        "swiglu_limit": 0.5,
        "sliding_window": 4,
    },
    "dots1": {**DEEPSEEK},
    "dots3_note_text": {
        **MLA,
        **DEEPSEEK,
        **INDEXER,
        **LAYERS,
        "layer_types": ["indexed_attention", "indexed_attention"],
        "per_layer_config": {},
        "shared_experts_intermediate_size": 16,
    },
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone_moe": {**EIGHT, "sliding_window": 4},
    "glm4_moe": {**DEEPSEEK},
    "glm4_moe_lite": {**MLA, **DEEPSEEK},
    "glm_moe_dsa": {**MLA, **DEEPSEEK, **INDEXER},
    "hy_v3": {**EIGHT},
    "hy_v4": {**MLA, **DEEPSEEK, **INDEXER, **LAYERS, "hc_mult": 2, "swiglu_limit": 0.5},
    "inkling2_text": {
        "n_routed_experts": 8,
        "unpadded_vocab_size": VOCAB,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "rel_extent": 16,
        "d_rel": 4,
        "mlp_gate_softcap": 0.5,
    },
    "inkling_text": {
        **LAYERS,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "rel_extent": 16,
        "d_rel": 4,
    },
    "kimi_linear": {**KDA, **LAYERS, "num_expert_group": 2, "topk_group": 1},
    "kolibri1": {**EIGHT, "shared_expert_intermediate_size": 16},
    "laguna": {**EIGHT, **LAYERS, "num_attention_heads_per_layer": [2, 2], "shared_expert_intermediate_size": 16},
    "lfm2_moe": {**EIGHT, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mellum": {**EIGHT},
    "minimax": {"num_local_experts": 8, "block_size": 4},
    "flint": {**EIGHT, "mlp_only_layers": [0], "shared_expert_intermediate_size": 16},
    "hunyuan_v1_moe": {**EIGHT, "moe_topk": 2},
    "flex_olmo": {**EIGHT, "head_dim": 12},
    "jamba": {
        **EIGHT,
        "head_dim": 12,
        "num_hidden_layers": 2,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "deepseek_v2": {**MLA, **DEEPSEEK, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "qwen3_5_moe_text": {**EIGHT, **NEXT},
    "qwen4_exp_text": {
        **EIGHT,
        **NEXT,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_count": 2,
        "hc_lowrank": 4,
    },
    "qwen3_next": {**EIGHT, **NEXT, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "longcat_flash": {
        **MLA,
        "num_layers": 1,
        "n_routed_experts": 8,
        "zero_expert_num": 4,
        "moe_topk": 4,
        "ffn_hidden_size": 16,
        "expert_ffn_hidden_size": 16,
    },
    "mimo_v2_flash": {
        **DEEPSEEK,
        **LAYERS,
        "head_dim": 24,
        "v_head_dim": 8,
        "num_key_value_heads": 1,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "minimax_m2": {"num_local_experts": 8},
    "minimax_m3_vl_text": {
        **LAYERS,
        "num_local_experts": 8,
        "dense_intermediate_size": 16,
        "shared_intermediate_size": 16,
        "rotary_dim": 4,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "swiglu_limit": 0.5,
    },
    "mixtral": {"num_local_experts": 8},
    "nemotron_h": {
        **DEEPSEEK,
        "layers_block_type": ["full_attention", "moe"],
        "moe_shared_expert_intermediate_size": 16,
        "moe_latent_size": 12,
        "mamba_num_heads": 2,
        "mamba_head_dim": 8,
    },
    "aria_text": {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1, "head_dim": 12},
    "cohere2_moe": {**EIGHT, "first_k_dense_replace": 1, "num_shared_experts": 1},
    "gemma4_text": {
        **EIGHT,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
    "gpt_oss": {"num_local_experts": 8, "sliding_window": 4},
    "granitemoe": {"num_local_experts": 8, "head_dim": 12},
    "granitemoe_swa": {"num_local_experts": 8, "sliding_window": 4},
    "granitemoehybrid": {
        "num_local_experts": 8,
        "layer_types": ["attention", "attention"],
        "shared_intermediate_size": 16,
        "mamba_n_heads": 2,
        "mamba_d_head": 24,
    },
    "granitemoeshared": {"num_local_experts": 8, "shared_intermediate_size": 16},
    "llama4_text": {"num_local_experts": 8, "moe_layers": [0, 1], "intermediate_size_mlp": 16},
    "olmoe": {**EIGHT, "head_dim": 12},
    "qwen2_moe": {**EIGHT, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EIGHT},
    "solar_open": {**DEEPSEEK},
}


def family_config(family: str, **overrides: Any) -> Any:
    """The family's configuration with tiny sizes; any key can be overridden."""
    return AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})


def family_model(family: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A model in float32 and training mode with the weights of this seed: the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(family_config(family, **overrides), dtype=torch.float32)
    return model.train()


def batch(seed: int, sequences: int = 4, positions: int = 6) -> dict[str, Tensor]:
    """input_ids and labels (B, S) of this seed."""
    ids = torch.randint(3, VOCAB, (sequences, positions), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def biases(model: nn.Module) -> list[Tensor]:
    """The selection biases that the model has now, in its order; themselves, not copies."""
    return [getattr(b.holder, b.bias_name) for b in moe_blocks(model) if hasattr(b.holder, b.bias_name)]


def set_biases(model: nn.Module, seed: int, shift: float = 0.0, last: float = 0.0) -> None:
    """The model's selection biases are random, uniform in [shift - 0.2, shift + 0.2).

    last: added to those of all experts but the first four.
    """
    generator = torch.Generator().manual_seed(seed)
    for bias in biases(model):
        bias.data.copy_(torch.rand(bias.shape, generator=generator) * 0.4 - 0.2 + shift)
        bias.data[..., 4:] += last


def logits_weights_ids(output: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, weights, ids) of a gate's output; Llama 4's weighs all experts, those not chosen by 0."""
    if len(output) > 2:
        return output[0], output[1], output[2]
    scores_TE, logits_TE = output
    ids_TK = (scores_TE != 0).nonzero()[:, 1].view(len(scores_TE), -1)
    return logits_TE, scores_TE.gather(1, ids_TK), ids_TK


def expected_load(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """int64 (L, E): how often the gates of a model of transformers choose each expert, counted one by one."""
    blocks, chosen = list(moe_blocks(model)), []
    hooks = [
        b.gate.register_forward_hook(lambda _, __, output: chosen.append(logits_weights_ids(output)[2])) for b in blocks
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    experts = [getattr(b.holder, b.bias_name).numel() if not b.added else b.num_experts for b in blocks]
    load_LE = torch.zeros(len(blocks), max(experts), dtype=torch.int64)
    for load_E, ids_TK in zip(load_LE, chosen):
        for i in ids_TK.flatten().tolist():
            load_E[i] += 1
    return load_LE
