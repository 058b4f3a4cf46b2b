"""The micro-batch in a model's forward, as its gates need to know it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from alfb_dist.balance.aux_loss import LossScale
from alfb_dist.moe.recompute import Run


@dataclass
class Batch:
    """The shape and padding of the current micro-batch; one object for all gates of a model."""

    shape: tuple[int, int] | None = None  # sequences, positions
    mask_BS: Tensor | None = None  # False on padding; None where nothing is padded
    evaluated_mask_BS: Tensor | None = None  # the same of an evaluation, which a backward still to come must not see
    loss_scale: LossScale = field(default_factory=LossScale)
    run: Run | None = None  # of a checkpointed layer, while it runs

    def noted(self) -> tuple[tuple[int, int] | None, Tensor | None]:
        """What a training forward has noted."""
        return self.shape, self.mask_BS

    def note(self, shape: tuple[int, int] | None, mask_BS: Tensor | None) -> None:
        """A training forward has this shape and mask."""
        self.shape, self.mask_BS = shape, mask_BS

    def mask_T(self, num_tokens: int, *, evaluated: bool = False) -> Tensor | None:
        """Return the mask of the forward's tokens in their order. Raises ValueError if it has another size."""
        mask_BS = self.evaluated_mask_BS if evaluated else self.mask_BS
        if mask_BS is None:
            return None
        if mask_BS.numel() != num_tokens:
            shape = tuple(mask_BS.shape)
            raise ValueError(f"the attention mask {shape} does not have one entry for each of {num_tokens} tokens")
        return mask_BS.flatten()
