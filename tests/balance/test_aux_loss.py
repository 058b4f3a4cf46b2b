"""The auxiliary losses against their formulas written out, as values and gradients of scores."""

from __future__ import annotations

import pytest
import torch
from support.aux_losses import slow_batch_loss, slow_sequence_loss
from torch import Tensor

from alfb_dist.balance.aux_loss import LossScale, attach, batch_loss, sequence_loss


def rand(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sequence_loss_by_hand() -> None:
    """Both tokens choose expert 0: f = 2 / (1 * 2) * (2, 0) = (2, 0); P = (0.7, 0.3)."""
    scores = torch.tensor([[[0.8, 0.2], [0.6, 0.4]]], dtype=torch.float64)
    assert sequence_loss(scores, None, 1).item() == pytest.approx(1.4, rel=1e-15)
    # Scores are normalised over the experts first.
    assert sequence_loss(scores * 0.5, None, 1).item() == pytest.approx(1.4, rel=1e-15)
    # The second sequence is balanced, f = (1, 1): its loss is 1, the mean 1.2.
    both = torch.cat([scores, torch.tensor([[[0.9, 0.1], [0.2, 0.8]]], dtype=torch.float64)])
    assert sequence_loss(both, None, 1).item() == pytest.approx(1.2, rel=1e-15)


def test_sequence_loss_of_padding_by_hand() -> None:
    scores = torch.tensor([[[0.8, 0.2], [0.1, 0.9]], [[0.6, 0.4], [0.2, 0.8]]], dtype=torch.float64)
    mask = torch.tensor([[True, False], [False, False]])
    # One token of the first sequence: f = (2, 0), P = (0.8, 0.2); the second has none and counts as 0.
    assert sequence_loss(scores, mask, 1).item() == pytest.approx(1.6 / 2, rel=1e-15)


def test_batch_loss_by_hand() -> None:
    scores = torch.tensor([[0.8, 0.2], [0.6, 0.4]], dtype=torch.float64)
    assert batch_loss(scores, None, torch.tensor([2, 0]), 1).item() == pytest.approx(1.4, rel=1e-15)
    assert batch_loss(scores, None, torch.tensor([1, 1]), 1).item() == pytest.approx(1.0, rel=1e-15)
    masked = batch_loss(scores, torch.tensor([True, False]), torch.tensor([0, 1]), 1)
    assert masked.item() == pytest.approx(2 * 0.2, rel=1e-15)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_sequence_loss_and_gradient_equal_the_formula(seed: int, padded: bool) -> None:
    fast, slow = (rand(seed, 4, 6, 8).requires_grad_() for _ in range(2))
    mask_BS = rand(seed + 9, 4, 6) > 0.4 if padded else torch.ones(4, 6, dtype=torch.bool)
    mask_BS[2] &= not padded  # a sequence of padding only
    ours, theirs = sequence_loss(fast, mask_BS if padded else None, 3), slow_sequence_loss(slow, mask_BS, 3)
    ours.backward(), theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_batch_loss_and_gradient_equal_the_formula(seed: int, padded: bool) -> None:
    fast, slow = (rand(seed, 12, 8).requires_grad_() for _ in range(2))
    mask_T = rand(seed + 9, 12) > 0.4 if padded else torch.ones(12, dtype=torch.bool)
    load_E = torch.bincount((rand(seed + 5, 12, 8).topk(3).indices[mask_T]).flatten(), minlength=8)
    ours = batch_loss(fast, mask_T if padded else None, load_E, 3)
    theirs = slow_batch_loss(slow[mask_T], load_E.tolist(), 3)
    ours.backward(), theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-11, atol=1e-14)


def test_balance_is_the_least_loss() -> None:
    """Scores that repeat the loads: even ones give 1, a collapse onto one of 4 experts gives 4."""
    even, collapsed = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3]], torch.eye(4, dtype=torch.float64)[[0, 0, 0, 0]]
    for scores_TE, load_E, expected in [(even, [1, 1, 1, 1], 1.0), (collapsed, [4, 0, 0, 0], 4.0)]:
        assert batch_loss(scores_TE, None, torch.tensor(load_E), 1).item() == expected
        assert sequence_loss(scores_TE[None], None, 1).item() == expected


def test_padding_only_gives_no_loss_and_no_nan() -> None:
    scores, nothing = rand(0, 5, 8).requires_grad_(), torch.zeros(5, dtype=torch.bool)
    total = batch_loss(scores, nothing, torch.zeros(8, dtype=torch.int64), 3)
    total = total + sequence_loss(scores[None], nothing[None], 3)
    total.backward()
    assert total.item() == 0 and not scores.grad.any()


def test_attached_loss_gets_the_scale_and_the_weights_keep_their_gradient() -> None:
    weights, parameter, scale = torch.ones(2, requires_grad=True), torch.tensor(3.0, requires_grad=True), LossScale()
    carried = attach(weights, parameter * 5, scale)
    assert torch.equal(carried, weights)
    (scale.of((carried * torch.tensor([1.0, 2.0])).sum()) * 0.25).backward()
    assert weights.grad.tolist() == [0.25, 0.5]
    assert parameter.grad.item() == 5 * 0.25
