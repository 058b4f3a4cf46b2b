"""Loads and the sign rule by hand, one by one, from the outputs of gates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def counted(ids: Iterable[Tensor], mask_BS: Tensor, num_experts: int) -> list[int]:
    """How often each expert was chosen by a token that is no padding. ids: int64 (T, K) of forwards in order."""
    load = [0] * num_experts
    for chosen, is_token in zip(torch.cat(list(ids)).tolist(), mask_BS.flatten().tolist(), strict=True):
        for expert in chosen if is_token else ():
            load[expert] += 1
    return load


def moved(bias: Any, load: list[int], rate: float) -> Any:
    """A float32 array of a bias, moved by the sign rule."""
    sign = [(n * len(load) < sum(load)) - (n * len(load) > sum(load)) for n in load]
    return bias + np.float32(rate) * np.array(sign, dtype=np.float32)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two float32 arrays are equal to the last bit."""
    return np.array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))
