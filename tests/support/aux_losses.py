"""The auxiliary losses written out, and models whose gradients they change."""

from __future__ import annotations

from typing import Any

import torch
from support.tiny import CHECKPOINTING, gates, random_biases, set_biases, tiny_model
from torch import Tensor, nn

ALPHA = 2.0


def slow_sequence_loss(scores_BSE: Tensor, mask_BS: Tensor, top_k: int) -> Tensor:
    """The mean over sequences of sum_i f_i P_i, token by token."""
    num_experts, total = scores_BSE.shape[2], scores_BSE.sum() * 0
    for scores_SE, mask_S in zip(scores_BSE, mask_BS):
        tokens = [s_E for s_E, real in zip(scores_SE, mask_S.tolist()) if real]
        for i in range(num_experts if tokens else 0):
            chosen = sum(i in sorted(range(num_experts), key=lambda j: -s_E[j].item())[:top_k] for s_E in tokens)
            f_i = num_experts / (top_k * len(tokens)) * chosen
            total = total + f_i * sum(s_E[i] / s_E.sum() for s_E in tokens) / len(tokens)
    return total / len(scores_BSE)


def slow_batch_loss(scores_TE: Tensor, load_E: list[int], top_k: int) -> Tensor:
    """sum_i f_i P_i over unpadded tokens, with f_i from the choices that were really made."""
    num_tokens, num_experts = scores_TE.shape
    assert sum(load_E) == top_k * num_tokens
    return sum(num_experts * n / (top_k * num_tokens) * scores_TE[:, i].mean() for i, n in enumerate(load_E))


def make_model(seed: int, *, checkpointing: str = "none", **overrides: Any) -> nn.Module:
    model = tiny_model(seed, **overrides).double()
    set_biases(model, random_biases(model, seed))
    for gate in gates(model):
        gate.e_score_correction_bias.data = gate.e_score_correction_bias.data.float()
    if CHECKPOINTING[checkpointing] is not None:
        model.activation_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    return model


def mask_of(batch: dict[str, Tensor]) -> Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def assert_adds(with_loss: dict[str, Tensor], without: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The difference of the gradients is the expected one, to the float32 of the gates."""
    reached = 0
    for name, gradient in expected.items():
        difference, size = with_loss[name] - without[name], gradient.norm().item()
        assert (difference - gradient).norm() <= 3e-5 * size + 1e-6, name
        reached += size > 1e-3
    assert reached > 10  # gates, and all that lies before them
