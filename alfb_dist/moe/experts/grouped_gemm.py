"""Products of each expert's rows with its matrix, by torch's grouped kernel where it applies."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

MAX_GROUPS = 1023
"""The most groups that torch's kernel takes."""


def _fit(a: Tensor, b: Tensor, *widths: int) -> bool:
    """Return whether torch's kernel takes these: all rows, also of the result, start at multiples of 16 bytes."""
    starts = (a.storage_offset(), b.storage_offset(), *widths)  # torch aligns the storage itself
    return len(a) > 0 and not any(start * a.element_size() % 16 for start in starts)


def _expert_slices(ends_e: Tensor) -> list[slice]:
    """Return each expert's places; waits for the device."""
    return [slice(start, end) for start, end in pairwise([0, *ends_e.tolist()])]


def grouped_mm(a_SM: Tensor, b_eMN: Tensor, ends_e: Tensor) -> Tensor:
    """Return each place's row times its expert's matrix: (S, N). b is contiguous, or the transpose of such.

    bfloat16 on an NVIDIA device of compute capability 9.0 or 10.0 is one kernel, for which the host does not wait.
    Other types and devices, and widths that are not a multiple of 16 bytes, are one product per expert.
    """
    if _fit(a_SM, b_eMN, *b_eMN.shape[1:]):
        return torch._grouped_mm(a_SM, b_eMN, offs=ends_e)
    out_SN = a_SM.new_empty(len(a_SM), b_eMN.shape[2])
    for part, b_MN in zip(_expert_slices(ends_e), b_eMN):
        torch.mm(a_SM[part], b_MN, out=out_SN[part])
    return out_SN


def grouped_outer(a_SM: Tensor, b_SN: Tensor, ends_e: Tensor) -> Tensor:
    """Return for each expert the sum over its places of the rows' outer products: (e, M, N); 0 without places."""
    if _fit(a_SM, b_SN, a_SM.shape[1], b_SN.shape[1]):
        return torch._grouped_mm(a_SM.T, b_SN, offs=ends_e)
    out_eMN = a_SM.new_empty(len(ends_e), a_SM.shape[1], b_SN.shape[1])
    for part, out_MN in zip(_expert_slices(ends_e), out_eMN):
        torch.mm(a_SM[part].T, b_SN[part], out=out_MN)
    return out_eMN
