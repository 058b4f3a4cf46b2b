"""Compare two stored models by their logits and biases, in float32 on CPU."""

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
from alfb_dist.pretrained.loading import extra_biases, load_biases, open_model, read_dense, read_experts
from alfb_dist.pretrained.names import is_bias
from alfb_dist.pretrained.weight_files import open_folder
from alfb_dist.pretrained.weights import ModelWeights

SEQUENCE = 128
"""Positions that are computed at a time, unless the model has fewer."""


@dataclass(frozen=True)
class Difference:
    """The difference of two models on the same tokens."""

    positions: int
    max_logit_difference: float
    """Infinite where a logit is not finite and the models differ."""
    same_bits: bool
    same_best: int
    """The number of positions with the same most likely token."""
    max_bias_difference: float

    def within(self, tolerance: float) -> bool:
        """Return whether logits differ by at most this, by no bit if it is 0, and biases not at all."""
        near = self.max_logit_difference <= tolerance if tolerance else self.same_bits
        return near and self.max_bias_difference == 0


def read_folder(folder: Path) -> nn.Module:
    """Return the whole model of a transformers directory in float32, as transformers itself reads it.

    What transformers cannot read, or not compute with on CPU, is read by this package: weights in 8 bits, models that
    come with their own code, and biases that transformers does not know.
    """
    from transformers import AutoModelForCausalLM

    values, added = read_values(folder), [n for n in open_folder(folder).tensors if n.endswith(ADDED_BIAS)]
    if values.get("quantization_config") is not None or foreign_type(values) is not None or added:
        template, weights, _ = open_model(folder, torch.float32)
        return fill_model(template, weights, extra_biases(folder, weights), folder / SIDECAR)
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            x.data = x.data.clone()  # in memory aligned by torch, not by the file
    return _with_biases(model, read_sidecar(folder), folder / SIDECAR)


def fill_model(template: Any, weights: ModelWeights, biases: dict[str, Tensor], path: Path) -> nn.Module:
    """Fill a float32 model on the meta device with these weights and return it.

    biases: those that the family's own model does not have, from the file `path`.
    """
    read_dense(template, weights, torch.float32)
    read_experts(template, weights)
    model: nn.Module = template.eval()
    return _with_biases(model, biases, path)


def read_checkpoint(checkpoint: Path, config: Any) -> nn.Module:
    """Return the whole model of a run's checkpoint in float32. config: transformers' configuration of it."""
    from alfb_dist.pretrained.checkpoint_weights import CheckpointWeights

    template = meta_model(config, torch.float32)
    weights = CheckpointWeights(checkpoint, template)
    return fill_model(template, weights, weights.extra_biases, checkpoint)


def _with_biases(model: nn.Module, biases: dict[str, Tensor], path: Path) -> nn.Module:
    if biases:
        load_biases(parallelize(model, ep_degree=1), biases, path)
    return model


def _biases(model: nn.Module) -> dict[str, Tensor]:
    """Return the biases other than 0, flat, by name."""
    return {n: x.float().flatten().clone() for n, x in model.state_dict().items() if is_bias(n) and bool(x.any())}


@torch.no_grad()
def _logits(model: Any, ids_T: Tensor) -> Tensor:
    length = min(SEQUENCE, getattr(model.config, "max_position_embeddings", SEQUENCE))
    return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in ids_T.split(length)])


def random_tokens(count: int, vocab_size: int) -> Tensor:
    """Return uniform token ids, int64 (count,), the same for the same arguments."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(0))


def compare(read: list[Callable[[], nn.Module]], ids_T: Tensor) -> Difference:
    """Return the difference of two models on these tokens. read: functions that read them; one is in memory at a time.

    Raises ValueError if their vocabularies differ or a token is not in them.
    """
    logits, biases = [], []
    for make in read:
        model: Any = make()
        vocab_size = model.get_input_embeddings().weight.shape[0]
        if int(ids_T.max()) >= vocab_size:
            raise ValueError(
                f"token ids must be below {vocab_size}, the size of the vocabulary; got {int(ids_T.max())}"
            )
        logits.append(_logits(model, ids_T))
        biases.append(_biases(model))
        del model
    a, b = logits
    if a.shape != b.shape:
        raise ValueError(
            f"models must have the same vocabulary to be compared; got sizes {a.shape[1]} and {b.shape[1]}"
        )
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
