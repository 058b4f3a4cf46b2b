"""A model written anew as a transformers folder: from a run's checkpoint, or from a folder in another layout.

One process, tensor by tensor, without other ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alfb_dist.checkpoint import files
from alfb_dist.pretrained.checkpoint_weights import CheckpointWeights
from alfb_dist.pretrained.folder import (
    SIDECAR,
    meta_model,
    read_generation_config,
    write_sidecar,
    write_small_files,
)
from alfb_dist.pretrained.fp8 import QUANTIZED
from alfb_dist.pretrained.loading import homeless_biases, open_model
from alfb_dist.pretrained.names import expert_counts, float32_names, is_bias, shapes_of
from alfb_dist.pretrained.outputs import Piece, plan_outputs
from alfb_dist.pretrained.weights import ModelWeights
from alfb_dist.pretrained.writing import MAX_SHARD_BYTES, cut, publish_folder, start_folder, write_index, write_shards


def to_hf(
    checkpoint: Path,
    path: Path,
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    bias_sidecar: bool = False,
    overwrite: bool = False,
    origin: Path | None = None,
) -> None:
    """The weights and biases of a checkpoint (a folder step-XXXXXXXX) are in a folder that transformers loads.

    config: transformers' configuration of the model. dtype: of the weights; biases, and what the family keeps so, are
    float32. layout, bias_sidecar: as in `save_pretrained`. origin: the folder that the run started from, whose
    tokenizer and generation settings come along.
    ValueError if the checkpoint is damaged, of another model, or holds biases without a place.
    """
    template = meta_model(config)
    weights = CheckpointWeights(checkpoint, template)
    if weights.homeless and not bias_sidecar:
        raise ValueError(
            f"{next(iter(weights.homeless))} has no place in the format of {type(template).__name__}: with a bias "
            f"sidecar it goes to {SIDECAR}, which only alfb_dist reads; transformers then routes without it"
        )
    _write(weights, template, path, dtype, layout, max_shard_bytes, overwrite, origin, weights.homeless)


def relayout(
    folder: Path,
    path: Path,
    *,
    layout: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """The model of a transformers folder is in another folder, its experts in this layout, files of this size.

    Tensors keep their types, but for biases, which are float32, and weights in 8 or 4 bits, which are dequantised to
    the type of the configuration. ValueError, before anything is written, where `from_pretrained` would raise one.
    """
    template, weights, dtype = open_model(folder)
    template.config.dtype = dtype
    sidecar = homeless_biases(folder, weights)
    _write(weights, template, path, None, layout, max_shard_bytes, overwrite, folder, sidecar)


def _write(
    weights: ModelWeights,
    template: Any,
    path: Path,
    dtype: torch.dtype | None,
    layout: str,
    max_shard_bytes: int,
    overwrite: bool,
    origin: Path | None,
    sidecar: dict[str, Tensor],
) -> None:
    outputs = plan_outputs(template, set(expert_counts(template)), layout)
    dtypes = _dtypes(weights, template, dtype)
    shards = cut(outputs, dtypes, max_shard_bytes)
    reader = _Reader(weights, shapes_of(template), dtypes)
    tmp = start_folder(path, overwrite=overwrite)
    try:
        write_shards(tmp, shards, reader.piece)
        write_index(tmp, shards)
        if origin is not None:
            read_generation_config(template, origin)
        write_small_files(tmp, template, dtype or template.config.dtype, origin)
        if sidecar:
            write_sidecar(tmp, sidecar)
        publish_folder(path)
    except BaseException:
        files.remove(tmp)
        raise


def _dtypes(weights: ModelWeights, template: Any, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The type that each tensor is written in. dtype: of weights; that in which they are stored, unless given."""
    wide = float32_names(template, dtype or template.config.dtype) if dtype else set()
    found = {}
    for name in weights.names:
        stored = weights.dtype(name)
        target = dtype or (template.config.dtype if stored in QUANTIZED else stored)
        found[name] = torch.float32 if is_bias(name) or name in wide else target
        if not stored.is_floating_point:
            found[name] = stored
    return found


class _Reader:
    """Reads pieces of a model's tensors, a whole tensor or a whole expert at a time, of which it keeps the last."""

    def __init__(
        self, weights: ModelWeights, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]
    ) -> None:
        self._weights, self._shapes, self._dtypes = weights, shapes, dtypes
        self._last: tuple[str, int | None] | None = None
        self._tensor = torch.empty(0)

    def piece(self, piece: Piece) -> Tensor:
        """Its values, flat."""
        if self._last != (piece.parameter, piece.expert):
            shape = self._shapes[piece.parameter]
            self._tensor = torch.empty(0)  # before the next is there
            whole = torch.empty(shape if piece.expert is None else (1, *shape[1:]), dtype=self._dtypes[piece.parameter])
            self._weights.fill(whole, piece.parameter, piece.expert or 0)
            self._last, self._tensor = (piece.parameter, piece.expert), whole.view(-1)
        return self._tensor[piece.start : piece.stop]
