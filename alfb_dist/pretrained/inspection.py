"""Describe a transformers directory: its layout, types, experts and biases."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alfb_dist.pretrained.folder import read_sidecar
from alfb_dist.pretrained.loading import is_rounded, open_model
from alfb_dist.pretrained.names import added_shapes, expert_counts, is_bias, shapes_of
from alfb_dist.pretrained.weights import FolderWeights


def describe_folder(folder: Path) -> dict[str, Any]:
    """Return the facts of a transformers directory by name. Reads headers and biases.

    Raises ValueError if tensors are missing, unknown or mis-shaped, so that a directory described can be read.
    """
    template, weights, _ = open_model(folder)
    stored = weights.reader.tensors.values()
    types = {name: sum(s.bytes for s in stored if s.dtype == name) for name in {s.dtype for s in stored}}
    counts = expert_counts(template)
    found = {
        "model": f"{type(template).__name__} ({template.config.model_type})",
        "layout": _layout(weights, counts),
        "files": len({s.path for s in stored}),
        "tensors": len(stored),
        "bytes": sum(types.values()),
        "types": {str(name).removeprefix("torch."): size for name, size in sorted(types.items(), key=str)},
        "experts": {name.rpartition(".")[0]: count for name, count in counts.items()},
    }
    for name, bias in _biases(template, weights).items():
        found[name] = bias_line(bias, weights.dtype(name))
    for name, bias in read_sidecar(folder).items():
        found[f"{name} (in its sidecar)"] = bias_line(bias, bias.dtype)
    return found


def _layout(weights: FolderWeights, names: Iterable[str]) -> str:
    forms = {"fused" if weights.origins[name].whole is not None else "per_expert" for name in names}
    return " and ".join(sorted(forms))


def _biases(template: Any, weights: FolderWeights) -> dict[str, Tensor]:
    shapes = shapes_of(template) | added_shapes(template)
    found = {name: torch.empty(shapes[name]) for name in weights.names if is_bias(name)}
    for name, bias in found.items():
        weights.fill(bias, name)
    return found


def bias_line(bias: Tensor, dtype: torch.dtype) -> str:
    """Return a bias in a line: range, mean, type, and whether it was rounded to 16 bits."""
    kind = str(dtype).removeprefix("torch.")
    state = "all 0" if not bool(bias.any()) else "rounded to 16 bits" if is_rounded(bias, dtype) else "not rounded"
    return f"{float(bias.min()):.6g} to {float(bias.max()):.6g}, mean {float(bias.mean()):.6g}, {kind}, {state}"
