"""Dequantise weights in 4-bit floats (mxfp4), as gpt-oss publishes its experts.

X is stored as `X_blocks` (E, rows, columns / 32, 16), uint8 with two numbers each, and `X_scales` (E, rows,
columns / 32), uint8, the exponent of two of each block of 32 numbers plus 127. X in the model is (E, columns, rows).
Source: Open Compute Project, Microscaling Formats, version 1.0. transformers unpacks them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from alfb_dist.checkpoint.safetensors_reader import Stored

METHOD, BLOCKS, SCALES, NUMBERS, BYTES = "mxfp4", "_blocks", "_scales", 32, 16
FLOAT4 = torch.float4_e2m1fn_x2


def packed_shapes(tensors: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the packed weights among tensors, by name, as in the model.

    Raises ValueError, naming a tensor, if blocks or scales are missing, not uint8, or of shapes that do not match.
    """
    names = [n.removesuffix(BLOCKS) for n in tensors if n.endswith(BLOCKS)]
    found: dict[str, tuple[int, ...]] = {}
    for name in names:
        blocks, scales = tensors[f"{name}{BLOCKS}"], tensors.get(f"{name}{SCALES}")
        if scales is None:
            raise ValueError(f"{name}{BLOCKS} is stored, but its scales {name}{SCALES} are missing")
        fits = len(blocks.shape) == 4 and blocks.shape == (*scales.shape, BYTES)
        if not fits or {blocks.dtype, scales.dtype} != {torch.uint8}:
            raise ValueError(
                f"{name}{BLOCKS} and {SCALES} are {blocks.shape} in {blocks.dtype} and {scales.shape} in "
                f"{scales.dtype}; they must be (E, rows, blocks, {BYTES}) and (E, rows, blocks) in uint8"
            )
        num_experts, rows, num_blocks = scales.shape
        found[name] = num_experts, num_blocks * NUMBERS, rows
    return found


def unpack(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers of some experts, float32 (e, columns, rows); each is exact in bfloat16, too."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
