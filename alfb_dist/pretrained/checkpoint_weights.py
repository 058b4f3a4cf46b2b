"""A model's tensors in a checkpoint of a run, under the model's names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alfb_dist.checkpoint import manifest, verify
from alfb_dist.checkpoint.safetensors_reader import SafetensorsReader
from alfb_dist.pretrained.names import expert_counts, is_bias, shapes_of


class CheckpointWeights:
    """The tensors of a model in a checkpoint, a directory step-XXXXXXXX."""

    def __init__(self, checkpoint: Path, template: Any) -> None:
        """Verify every byte. Raises ValueError, naming file or tensor, if it is damaged or of another model."""
        if problems := verify(checkpoint):
            raise ValueError(problems[0])
        names = manifest.read(checkpoint)["files"]
        self._reader = SafetensorsReader(checkpoint / name for name in names if name.endswith(".safetensors"))
        self._experts = expert_counts(template)
        self._shapes = shapes_of(template)
        for name, shape in self._shapes.items():
            for key in self._keys(name):
                self._check(checkpoint, key, shape[1:] if name in self._experts else shape)
        self.extra_biases = self._extra_biases()
        """Selection biases, other than 0, that the family's own model does not have."""

    def _check(self, checkpoint: Path, key: str, shape: tuple[int, ...]) -> None:
        stored = self._reader.tensors.get(key)
        if stored is None:
            raise ValueError(f"{checkpoint} has no {key}: give the configuration of its model")
        if torch.Size(stored.shape).numel() != torch.Size(shape).numel():
            raise ValueError(
                f"{key} is {stored.shape} in {checkpoint} and {shape} by the configuration: give that of its model"
            )

    def _key(self, name: str) -> str:
        kinds = ("bias",) if is_bias(name) else ("weight", "buffer")
        return next(
            (k for k in (f"{kind}/{name}" for kind in kinds) if k in self._reader.tensors), f"{kinds[0]}/{name}"
        )

    def _keys(self, name: str) -> list[str]:
        if name not in self._experts:
            return [self._key(name)]
        return [f"weight/{name}/{e}" for e in range(self._experts[name])]

    def _extra_biases(self) -> dict[str, Tensor]:
        keys = [key for key in self._reader.tensors if key.startswith("bias/")]
        extra = [key for key in keys if key.removeprefix("bias/") not in self._shapes]
        found = {key.removeprefix("bias/"): self._reader.read(key) for key in extra}
        return {name: bias for name, bias in found.items() if bool(bias.any())}

    @property
    def names(self) -> Collection[str]:
        """The names of the model's tensors, all of which are stored."""
        return self._shapes.keys()

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which a tensor is stored."""
        return self._reader.tensors[self._keys(name)[0]].dtype

    def fill(self, destination: Tensor, name: str, first: int = 0) -> None:
        """Fill the destination (contiguous) with the rows of a tensor from `first` on, cast to its type.

        Rows that belong to no expert become 0.
        """
        if name not in self._experts:
            key = self._key(name)
            flat = is_bias(name)  # (E,) in a checkpoint, whatever its shape in the family
            self._reader.copy_rows(destination.view(-1) if flat else destination, key, first)
            return
        for expert, row in enumerate(destination, first):
            if expert < self._experts[name]:
                self._reader.copy_rows(row, f"weight/{name}/{expert}")
            else:
                row.zero_()
