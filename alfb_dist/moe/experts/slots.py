"""The filled slots of rows, sorted by expert, without waiting for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """The slots of (R, K) in order by expert: places 0 to S - 1. All int32, on the device of the ids.

    slot_S: the slot (row * K + k) at each place; by expert, then by slot. Places from ends_e[-1] on are unused.
    place_RK: the place of each slot, -1 for an empty one. ends_e: the end of each expert's places.
    """

    slot_S: Tensor
    place_RK: Tensor
    ends_e: Tensor


def sort_slots(expert_ids_RK: Tensor, num_experts: int, num_places: int | None = None) -> Slots:
    """Return the slots with ids in [0, num_experts), sorted by expert; an id of num_experts is an empty slot.

    num_places: S, at least the number of filled slots, which the host cannot know without waiting for the device; R * K
    by default.
    """
    ids_N = expert_ids_RK.flatten()
    narrow = torch.uint8 if num_experts < 256 else torch.int16 if num_experts < 2**15 else torch.int32
    sorted_N, slot_N = ids_N.to(narrow).sort(stable=True)  # a radix sort takes a pass per byte
    experts_e = torch.arange(num_experts, device=ids_N.device, dtype=torch.int32)
    ends_e = torch.searchsorted(sorted_N.to(torch.int32), experts_e, right=True, out_int32=True)
    places_N = torch.arange(slot_N.numel(), device=ids_N.device, dtype=torch.int32)
    place_N = torch.empty_like(places_N).scatter_(0, slot_N, places_N)
    place_N = torch.where(ids_N < num_experts, place_N, -1)
    return Slots(slot_N[:num_places].to(torch.int32), place_N.view_as(expert_ids_RK), ends_e)
