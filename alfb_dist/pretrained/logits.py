"""Whether two stored models compute the same: logits and biases, side by side, in float32 on CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alfb_dist.moe.families.blocks import ADDED_BIAS
from alfb_dist.moe.parallelize import parallelize
from alfb_dist.pretrained.folder import SIDECAR, foreign_type, meta_model, read_sidecar, read_values
from alfb_dist.pretrained.loading import homeless_biases, open_model, put_biases, read_common, read_experts
from alfb_dist.pretrained.names import is_bias
from alfb_dist.pretrained.weight_files import open_folder
from alfb_dist.pretrained.weights import ModelWeights

SEQUENCE = 128
"""Positions that are computed at a time, if the model has room for so many."""


@dataclass(frozen=True)
class Difference:
    """How far the second model is from the first."""

    positions: int
    max_logit_difference: float
    """Infinite where one has a logit that is not finite and the other another."""
    same_bits: bool
    same_best: int
    """Positions whose likeliest token is the same."""
    max_bias_difference: float

    def within(self, tolerance: float) -> bool:
        """Whether the logits differ by at most this, and the biases not at all. 0: every bit is the same."""
        near = self.max_logit_difference <= tolerance if tolerance else self.same_bits
        return near and self.max_bias_difference == 0


def read_folder(folder: Path) -> nn.Module:
    """The whole model of a transformers folder, as transformers itself reads it, in float32.

    What transformers cannot read, or not compute with on CPU, is read here: weights in 8 bits, models that bring code
    of their own, and biases that transformers does not know.
    """
    from transformers import AutoModelForCausalLM

    values, added = read_values(folder), [n for n in open_folder(folder).tensors if n.endswith(ADDED_BIAS)]
    if values.get("quantization_config") is not None or foreign_type(values) is not None or added:
        template, weights, _ = open_model(folder, torch.float32)
        return filled(template, weights, homeless_biases(folder, weights), folder / SIDECAR)
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            x.data = x.data.clone()  # aligned as torch does it, and not as the file happens to lie
    return _with_biases(model, read_sidecar(folder), folder / SIDECAR)


def filled(template: Any, weights: ModelWeights, biases: dict[str, Tensor], where: Path) -> nn.Module:
    """The whole model of this template, made without memory in float32, with these weights.

    biases: those that the family has no place for; where: the file that they are from.
    """
    read_common(template, weights, torch.float32)
    read_experts(template, weights)
    model: nn.Module = template.eval()
    return _with_biases(model, biases, where)


def read_checkpoint(checkpoint: Path, config: Any) -> nn.Module:
    """The whole model of a run's checkpoint, in float32. config: transformers' configuration of it."""
    from alfb_dist.pretrained.checkpoint_weights import CheckpointWeights

    template = meta_model(config, torch.float32)
    weights = CheckpointWeights(checkpoint, template)
    return filled(template, weights, weights.homeless, checkpoint)


def _with_biases(model: nn.Module, biases: dict[str, Tensor], where: Path) -> nn.Module:
    if biases:
        put_biases(parallelize(model, ep_degree=1), biases, where)
    return model


def _biases(model: nn.Module) -> dict[str, Tensor]:
    """The biases other than 0, flat, by name."""
    return {n: x.float().flatten().clone() for n, x in model.state_dict().items() if is_bias(n) and bool(x.any())}


@torch.no_grad()
def _logits(model: Any, ids_T: Tensor) -> Tensor:
    length = min(SEQUENCE, getattr(model.config, "max_position_embeddings", SEQUENCE))
    return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in ids_T.split(length)])


def random_tokens(count: int, vocab_size: int) -> Tensor:
    """Token ids, uniform, the same for the same numbers: int64 (T,)."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(0))


def compare(read: list[Callable[[], nn.Module]], ids_T: Tensor) -> Difference:
    """How far the second model is from the first on these tokens. read: makes each; one is in memory at a time.

    ValueError if they have not the same vocabulary, or a token is not in it.
    """
    logits, biases = [], []
    for make in read:
        model: Any = make()
        vocab_size = model.get_input_embeddings().weight.shape[0]
        if int(ids_T.max()) >= vocab_size:
            raise ValueError(f"token {int(ids_T.max())} is not in the vocabulary of {vocab_size}")
        logits.append(_logits(model, ids_T))
        biases.append(_biases(model))
        del model
    a, b = logits
    if a.shape != b.shape:
        raise ValueError(f"the models have vocabularies of {a.shape[1]} and {b.shape[1]}")
    off = (a - b).abs().nan_to_num(nan=float("inf")).masked_fill(a.eq(b) | (a.isnan() & b.isnan()), 0)
    none = torch.zeros(())
    pairs = [(biases[0].get(n, none), biases[1].get(n, none)) for n in {*biases[0], *biases[1]}]
    apart = [float((x - y).abs().max()) for x, y in pairs if x.shape == y.shape or not x.dim() or not y.dim()]
    return Difference(
        positions=len(ids_T),
        max_logit_difference=float(off.max()),
        same_bits=torch.equal(a.view(torch.int32), b.view(torch.int32)),
        same_best=int((a.argmax(-1) == b.argmax(-1)).sum()),
        max_bias_difference=max(apart, default=0.0) if len(apart) == len(pairs) else float("inf"),
    )
