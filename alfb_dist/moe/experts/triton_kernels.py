"""The computations between the grouped products, as fused Triton kernels; torch_kernels.py has the same functions.

Each program computes a tile of rows and columns. Row numbers are int64 when multiplied by a width, since a large batch
has more than 2^31 elements.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alfb_dist.moe.experts.slots import Slots

ROWS = 8
"""Rows of a tile."""
MAX_COLUMNS = 256


@triton.jit
def _gather_rows(x, slot, end, out, width, num_slots, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = place < tl.load(end)
    row = (tl.load(slot + place, mask=used, other=0) // num_slots).to(tl.int64)
    mask = used[:, None] & (column < width)[None, :]
    values = tl.load(x + row[:, None] * width + column[None, :], mask=mask)
    tl.store(out + place[:, None] * width + column[None, :], values, mask=mask)


@triton.jit
def _combine_rows(y, place, out, num_rows, width, num_slots, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < num_rows
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(num_slots):
        source = tl.load(place + row * num_slots + k, mask=inside, other=-1).to(tl.int64)
        mask = (source >= 0)[:, None] & (column < width)[None, :]
        total += tl.load(y + source[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
    mask = inside[:, None] & (column < width)[None, :]
    tl.store(out + row[:, None] * width + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu(gate_up, weights, slot, end, h, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = place < tl.load(end)
    mask = used[:, None] & (column < width)[None, :]
    weight = tl.load(weights + tl.load(slot + place, mask=used, other=0), mask=used, other=0.0).to(tl.float32)
    at = place[:, None] * (2 * width) + column[None, :]
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=mask, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * weight[:, None]
    tl.store(h + place[:, None] * width + column[None, :], value.to(h.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(  # type: ignore[no-untyped-def]
    gate_up, grad_h, weights, slot, end, h, grad_gate_up, grad_weights, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    used = place < tl.load(end)
    at_slot = tl.load(slot + place, mask=used, other=0)
    weight = tl.load(weights + at_slot, mask=used, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = used[:, None] & (column < width)[None, :]
        at, at_both = place[:, None] * width + column[None, :], place[:, None] * (2 * width) + column[None, :]
        gate = tl.load(gate_up + at_both, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + at_both + width, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_h + at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += tl.sum(grad * silu * up, axis=1)
        grad *= weight
        grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(h + at, (silu * up * weight).to(h.dtype.element_ty), mask=mask)
        tl.store(grad_gate_up + at_both, grad_gate.to(grad_gate_up.dtype.element_ty), mask=mask)
        tl.store(grad_gate_up + at_both + width, (grad * silu).to(grad_gate_up.dtype.element_ty), mask=mask)
    tl.store(grad_weights + at_slot, total.to(grad_weights.dtype.element_ty), mask=used)


def _tiles(num_rows: int, width: int | None) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the grid and the tile's shape, with one program for all columns if the width is None."""
    columns = MAX_COLUMNS if width is None else min(MAX_COLUMNS, triton.next_power_of_2(width))
    across = () if width is None else (triton.cdiv(width, columns),)
    return (triton.cdiv(num_rows, ROWS), *across), {"ROWS": ROWS, "COLUMNS": columns}


def gather_rows(x_RD: Tensor, slots: Slots) -> Tensor:
    """Return the row of each place: (S, D)."""
    out_SD = x_RD.new_empty(len(slots.slot_S), x_RD.shape[1])
    if out_SD.numel():
        grid, tile = _tiles(*out_SD.shape)
        top_k = slots.place_RK.shape[1]
        _gather_rows[grid](x_RD, slots.slot_S, slots.ends_e[-1:], out_SD, x_RD.shape[1], top_k, **tile)
    return out_SD


def combine_rows(y_SD: Tensor, slots: Slots) -> Tensor:
    """Return for each row the sum over its filled slots, slot after slot: (R, D), in y's type."""
    num_rows, top_k = slots.place_RK.shape
    out_RD = y_SD.new_empty(num_rows, y_SD.shape[1])
    if out_RD.numel():
        grid, tile = _tiles(*out_RD.shape)
        _combine_rows[grid](y_SD, slots.place_RK, out_RD, num_rows, y_SD.shape[1], top_k, **tile)
    return out_RD


def swiglu(gate_up_S2F: Tensor, weights_RK: Tensor, slots: Slots) -> Tensor:
    """Return silu(gate) * up * weight: (S, F)."""
    h_SF = gate_up_S2F.new_empty(len(gate_up_S2F), gate_up_S2F.shape[1] // 2)
    if h_SF.numel():
        grid, tile = _tiles(*h_SF.shape)
        _swiglu[grid](gate_up_S2F, weights_RK, slots.slot_S, slots.ends_e[-1:], h_SF, h_SF.shape[1], **tile)
    return h_SF


def swiglu_backward(
    gate_up_S2F: Tensor, grad_h_SF: Tensor, weights_RK: Tensor, slots: Slots
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (weight * h, dL/d(gate_up), dL/dweights) for h = silu(gate) * up and grad_h = dL/d(weight * h).

    dL/dweights: (R, K), 0 for empty slots.
    """
    h_SF, grad_gate_up_S2F = torch.empty_like(grad_h_SF), torch.empty_like(gate_up_S2F)
    grad_weights_RK = torch.zeros_like(weights_RK)
    if h_SF.numel():
        grid, tile = _tiles(len(h_SF), None)
        read = (gate_up_S2F, grad_h_SF, weights_RK, slots.slot_S, slots.ends_e[-1:])
        _swiglu_backward[grid](*read, h_SF, grad_gate_up_S2F, grad_weights_RK, h_SF.shape[1], **tile)
    return h_SF, grad_gate_up_S2F, grad_weights_RK
