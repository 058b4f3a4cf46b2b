"""A model's tensors in a transformers directory, under the model's names: checked, dequantised, read in parts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from alfb_dist.checkpoint.safetensors_reader import SafetensorsReader, rows_at_once
from alfb_dist.pretrained.fp8 import FLOAT8, SUFFIX, dequantize, scale_shape, scales_of
from alfb_dist.pretrained.mxfp4 import BLOCKS, FLOAT4, SCALES, packed_shapes, unpack
from alfb_dist.pretrained.names import added_shapes
from alfb_dist.pretrained.origins import Origin, find_origins


class ModelWeights(Protocol):
    """The stored tensors of a model under its own names."""

    @property
    def names(self) -> Collection[str]:
        """The names of the model's tensors that are stored."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which a tensor, or its first part, is stored."""

    def fill(self, destination: Tensor, name: str, first: int = 0) -> None:
        """Fill the destination (contiguous) with the rows of a tensor from `first` on, cast to its type."""


class FolderWeights:
    """The tensors of a model in a transformers directory."""

    def __init__(
        self, reader: SafetensorsReader, template: Any, block: tuple[int, int] = (128, 128), *, part: bool = False
    ) -> None:
        """Check names and shapes; no tensor is read.

        block: of fp8. part: whether the model is the language model of a multimodal one. Raises ValueError, naming
        tensors, if some are missing, unknown or mis-shaped, or weights in 8 or 4 bits have no matching scales.
        """
        self.reader, self._block = reader, block
        self._scales = scales_of(reader.tensors)
        self._packed = packed_shapes(reader.tensors)
        taken = {*self._scales.values(), *(f"{name}{end}" for name in self._packed for end in (BLOCKS, SCALES))}
        shapes = {name: stored.shape for name, stored in reader.tensors.items() if name not in taken}
        self.origins: dict[str, Origin] = find_origins(template, shapes | self._packed, part=part)
        self._added = added_shapes(template)
        for origin in self.origins.values():
            for name in origin.names():
                self._check_type(name)

    def _check_type(self, name: str) -> None:
        if name in self._packed:
            return
        stored, scale = self.reader.tensors[name], self._scales.get(name)
        if stored.dtype != FLOAT8:
            if scale is not None:
                raise ValueError(f"{name} is {stored.dtype}, but has scales: {scale}")
            return
        if scale is None:
            raise ValueError(f"{name} is {stored.dtype}, but its scales {name}{SUFFIX} are missing")
        expected = scale_shape(stored.shape, self._block)
        if (found := self.reader.tensors[scale].shape) != expected:
            raise ValueError(f"{scale} is {found}, but blocks of {self._block} in {stored.shape} need {expected}")

    @property
    def names(self) -> Collection[str]:
        """The names of the model's tensors that are stored."""
        return self.origins.keys()

    def added_biases(self) -> dict[str, Tensor]:
        """Return the biases among the tensors that the family's own model does not have, float32, by name."""
        found = {name: torch.empty(shape) for name, shape in self._added.items() if name in self.origins}
        for name, bias in found.items():
            self.fill(bias, name)
        return found

    def dtype(self, name: str) -> torch.dtype:
        """Return the type in which a tensor, or its first part, is stored."""
        first = self.origins[name].names()[0]
        return FLOAT4 if first in self._packed else self.reader.tensors[first].dtype

    def fill(self, destination: Tensor, name: str, first: int = 0) -> None:
        """Fill the destination (contiguous) with the rows of a tensor from `first` on, cast to its type.

        Rows of experts that the directory may omit become 0.
        """
        origin = self.origins[name]
        if origin.whole is not None:
            self._fill_rows(destination, origin.whole, first)
            return
        targets = list(destination) if origin.stacked else [destination]
        for target, parts in zip(targets, origin.parts[first : first + len(targets)], strict=True):
            if not parts:
                target.zero_()
                continue
            for part, part_name in zip(target.chunk(len(parts)), parts):
                self._fill_rows(part, part_name, 0)

    def _fill_packed(self, destination: Tensor, name: str, first: int) -> None:
        for expert, row in enumerate(destination, first):
            blocks, scales = (self.reader.rows(f"{name}{end}", expert, expert + 1) for end in (BLOCKS, SCALES))
            row.copy_(unpack(blocks, scales)[0])

    def _fill_rows(self, destination: Tensor, name: str, first: int) -> None:
        if name in self._packed:
            self._fill_packed(destination, name, first)
            return
        stored = self.reader.tensors[name]
        if stored.dtype != FLOAT8:
            self.reader.copy_rows(destination, name, first)
            return
        step = rows_at_once(stored)
        if len(stored.shape) == 2:
            step = max(1, step // self._block[0]) * self._block[0]
        for start in range(0, len(destination), step):
            stop = min(start + step, len(destination))
            read = self.reader.rows(name, first + start, first + stop)
            scale = self._scale(name, first + start, first + stop)
            destination[start:stop].copy_(dequantize(read, scale, self._block))

    def _scale(self, name: str, start: int, stop: int) -> Tensor:
        """Return the scales of these rows of an 8-bit weight."""
        if len(self.reader.tensors[name].shape) == 2:
            start, stop = start // self._block[0], -(-stop // self._block[0])
        return self.reader.rows(self._scales[name], start, stop)

    def unequal_tied(self, tied: Mapping[str, str]) -> list[str]:
        """Return the tied tensors that are stored with other values than their source. tied: source by name."""
        found = []
        for target, source in tied.items():
            if target not in self.origins or source not in self.origins:
                continue
            names = self.origins[target].whole, self.origins[source].whole
            if names[0] is not None and names[1] is not None and not self._equal(names[0], names[1]):
                found.append(target)
        return found

    def _equal(self, a: str, b: str) -> bool:
        stored, other = self.reader.tensors[a], self.reader.tensors[b]
        if stored.shape != other.shape or stored.dtype != other.dtype:
            return False
        num_rows, step = (stored.shape or (1,))[0], rows_at_once(stored)
        blocks = [(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]
        return all(torch.equal(self.reader.rows(a, *x), self.reader.rows(b, *x)) for x in blocks)
