"""A training checkpoint written as a transformers folder, tensor by tensor, without other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alfb_dist.checkpoint import files, manifest, verify
from alfb_dist.pretrained.folder import meta_model, write_small_files
from alfb_dist.pretrained.names import Piece, is_bias, plan_outputs
from alfb_dist.pretrained.source import Source
from alfb_dist.pretrained.writing import MAX_SHARD_BYTES, cut, publish_folder, start_folder, write_index, write_shards


def to_hf(
    checkpoint: Path,
    path: Path,
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """The weights and biases of a checkpoint (a folder step-XXXXXXXX) are in a folder that transformers loads.

    config: transformers' configuration of the model. dtype: of the weights; biases are float32. layout: as in
    `save_pretrained`. ValueError if the checkpoint is damaged, of another model, or holds biases without a place.
    """
    if problems := verify(checkpoint):
        raise ValueError(problems[0])
    template = meta_model(config)
    body = manifest.read(checkpoint)
    source = Source(checkpoint / name for name in body["files"] if name.endswith(".safetensors"))
    experts = {
        name for name in template.state_dict() if any(name.rpartition(".")[0] == layer for layer in body["experts"])
    }
    outputs = plan_outputs(template, experts, layout)
    pieces = [piece for output in outputs for piece in output.pieces]
    if absent := [key for key in (_key(piece, experts) for piece in pieces) if key not in source.tensors]:
        raise ValueError(f"{checkpoint} has no {absent[0]}: it is of another model than the configuration")
    written = {_key(piece, experts) for piece in pieces}
    homeless = [key for key in source.tensors if key.startswith("bias/") and key not in written]
    if homeless := [key for key in homeless if bool(source.read(key).any())]:
        raise ValueError(
            f"{homeless[0]} has no place in this family's format: load the checkpoint into the model and use "
            "save_pretrained with bias_sidecar=True"
        )
    dtypes = {piece.parameter: _dtype(piece, experts, source, dtype) for piece in pieces}

    def read(piece: Piece) -> Tensor:
        flat = source.read(_key(piece, experts)).view(-1)
        return flat[piece.start : piece.stop].to(dtypes[piece.parameter]).contiguous()

    shards = cut(outputs, dtypes, max_shard_bytes)
    tmp = start_folder(path, overwrite=overwrite)
    try:
        write_shards(tmp, shards, read)
        write_index(tmp, shards)
        write_small_files(tmp, template, dtype, None)
        publish_folder(path)
    except BaseException:
        files.remove(tmp)
        raise


def _key(piece: Piece, experts: set[str]) -> str:
    """What a tensor is called in a checkpoint."""
    if piece.parameter in experts:
        return f"weight/{piece.parameter}/{piece.expert}"
    return f"{'bias' if is_bias(piece.parameter) else 'weight'}/{piece.parameter}"


def _dtype(piece: Piece, experts: set[str], source: Source, dtype: torch.dtype) -> torch.dtype:
    stored = source.tensors[_key(piece, experts)].dtype
    return torch.float32 if is_bias(piece.parameter) else dtype if stored.is_floating_point else stored
