"""The micro-batch in a model's forward, as its gates need to know it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from alfb_dist.balance.aux_loss import LossScale
from alfb_dist.moe.recompute import Recording


@dataclass
class Batch:
    """Shape and padding of the current micro-batch; one object for all gates of a model."""

    shape: tuple[int, int] | None = None  # sequences, positions
    mask_BS: Tensor | None = None  # False on padding; None where nothing is padded
    evaluated_mask_BS: Tensor | None = None  # of an evaluation, which the backward of a training forward must not see
    loss_scale: LossScale = field(default_factory=LossScale)
    recording: Recording | None = None  # of a checkpointed layer, while it runs

    def snapshot(self) -> tuple[Any, ...]:
        """Return what a recompute of the current training forward needs."""
        return self.shape, self.mask_BS

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Set the batch of a snapshot."""
        self.shape, self.mask_BS = snapshot

    def mask_T(self, num_tokens: int, *, evaluated: bool = False) -> Tensor | None:
        """Return the mask of the forward's tokens in their order. Raises ValueError if it has another size."""
        mask_BS = self.evaluated_mask_BS if evaluated else self.mask_BS
        if mask_BS is None:
            return None
        if mask_BS.numel() != num_tokens:
            shape = tuple(mask_BS.shape)
            raise ValueError(f"the attention mask {shape} does not have one entry for each of {num_tokens} tokens")
        return mask_BS.flatten()
