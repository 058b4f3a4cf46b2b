"""Convert a run's checkpoint, or a transformers directory in another layout, to a transformers directory.

In one process, tensor by tensor.
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
from alfb_dist.pretrained.loading import extra_biases, open_model
from alfb_dist.pretrained.names import expert_counts, float32_names, is_bias, shapes_of
from alfb_dist.pretrained.outputs import Piece, plan_outputs
from alfb_dist.pretrained.weights import ModelWeights
from alfb_dist.pretrained.writing import (
    MAX_SHARD_BYTES,
    plan_shards,
    publish_folder,
    start_folder,
    write_index,
    write_shards,
)


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
    """Write the weights and biases of a checkpoint (a directory step-XXXXXXXX) as a directory that transformers loads.

    config: transformers' configuration of the model. dtype: of the weights; biases, and what the family keeps in
    float32, are float32. layout, bias_sidecar: as in `save_pretrained`. origin: the directory that the run started
    from, whose tokenizer and generation settings are copied.
    Raises ValueError if the checkpoint is damaged, of another model, or has biases that the family does not have.
    """
    template = meta_model(config)
    weights = CheckpointWeights(checkpoint, template)
    if weights.extra_biases and not bias_sidecar:
        raise ValueError(
            f"{next(iter(weights.extra_biases))} has no place in the format of {type(template).__name__}: write a bias "
            f"sidecar, {SIDECAR}, which only alfb_dist reads; transformers then routes without it"
        )
    _write(weights, template, path, dtype, layout, max_shard_bytes, overwrite, origin, weights.extra_biases)


def relayout(
    folder: Path,
    path: Path,
    *,
    layout: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write the model of a transformers directory to another, with its experts in this layout and files of this size.

    Tensors keep their types, except biases, which become float32, and weights in 8 or 4 bits, which are dequantised to
    the type of the configuration. Raises ValueError as `from_pretrained` does, before anything is written.
    """
    template, weights, dtype = open_model(folder)
    template.config.dtype = dtype
    sidecar = extra_biases(folder, weights)
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
    shards = plan_shards(outputs, dtypes, max_shard_bytes)
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
    """Return the type in which each tensor is written. dtype: of weights; None keeps the type stored."""
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
    """Reads pieces of a model's tensors, by whole tensors or experts, and keeps the last of these."""

    def __init__(
        self, weights: ModelWeights, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]
    ) -> None:
        self._weights, self._shapes, self._dtypes = weights, shapes, dtypes
        self._last: tuple[str, int | None] | None = None
        self._tensor = torch.empty(0)

    def piece(self, piece: Piece) -> Tensor:
        """Return the values of a piece, flat."""
        if self._last != (piece.parameter, piece.expert):
            shape = self._shapes[piece.parameter]
            self._tensor = torch.empty(0)  # freed before the next is read
            whole = torch.empty(shape if piece.expert is None else (1, *shape[1:]), dtype=self._dtypes[piece.parameter])
            self._weights.fill(whole, piece.parameter, piece.expert or 0)
            self._last, self._tensor = (piece.parameter, piece.expert), whole.view(-1)
        return self._tensor[piece.start : piece.stop]
