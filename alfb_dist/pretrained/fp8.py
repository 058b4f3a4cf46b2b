"""Dequantise weights in 8-bit floats with one scale a block, as DeepSeek publishes them.

A float8_e4m3fn `X.weight` has scales `X.weight_scale_inv`, one float32 a block of 128 x 128. The weight is their
product. Source: arXiv:2412.19437, section 3.3; the name is that of the published files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from alfb_dist.pretrained.mxfp4 import FLOAT4, METHOD

SUFFIX = "_scale_inv"
FLOAT8 = torch.float8_e4m3fn
QUANTIZED = (FLOAT8, FLOAT4)
"""The types of weights that are multiplied by scales when read."""


def block_size(quantization: Mapping[str, Any] | None) -> tuple[int, int]:
    """Return (rows, columns) of an fp8 block by a config's `quantization_config`.

    Raises ValueError if it is neither block-wise fp8 nor mxfp4.
    """
    if quantization is None:
        return 128, 128
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size", [128, 128])
    if method == METHOD:  # its blocks are in the shapes of its tensors
        return 128, 128
    if method != "fp8" or not block:
        raise ValueError(
            f"quantization_config: quant_method {method!r} with weight_block_size {block!r} is not supported: use "
            "float weights, fp8 with a block size, or mxfp4"
        )
    return int(block[0]), int(block[1])


def scales_of(names: Iterable[str]) -> dict[str, str]:
    """Return the names of scales by the names of their weights."""
    names = set(names)
    found = {name.removesuffix(SUFFIX): name for name in names if name.endswith(SUFFIX)}
    return {weight: scale for weight, scale in found.items() if weight in names}


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scales of a weight: the last two dimensions in blocks, the last blocks partial."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the weight times the scales of its blocks, float32. The first row must be the first of a block."""
    rows, columns = weight.shape[-2:]
    wide = scale.float().repeat_interleave(block[0], -2)[..., :rows, :]
    return weight.float() * wide.repeat_interleave(block[1], -1)[..., :columns]
