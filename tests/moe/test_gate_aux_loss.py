"""The auxiliary losses as gradients of a whole model, against their formulas written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.aux_losses import ALPHA, assert_adds, make_model, mask_of, slow_batch_loss, slow_sequence_loss
from support.tiny import CHECKPOINTING, GROUP_LIMITED, TOP_K, gates, part, tiny_batch
from torch import Tensor, nn

from alfb_dist.moe.parallelize import parallelize

Batch = dict[str, Tensor]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def trained(model: nn.Module, batches: list[Batch], *, divide: float = 1.0) -> dict[str, Tensor]:
    for batch in batches:
        (model(**batch).loss / divide).backward()
    return gradients(model)


def explicit(model: nn.Module, batches: list[Batch], loss_of: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Gradients of loss_of(scores_TE, ids_TK, batch) summed over layers and batches, in transformers' own model."""
    for batch in batches:
        seen: list[Any] = []
        hooks = [g.register_forward_hook(lambda _, __, out: seen.append(out)) for g in gates(model)]  # noqa: B023
        model(**batch)
        sum(loss_of(logits.double().sigmoid(), ids, batch) for logits, _, ids in seen).backward()
        for hook in hooks:
            hook.remove()
    zero = torch.zeros((), dtype=torch.float64)
    return {n: zero.expand_as(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def explicit_sequence(scores_TE: Tensor, ids_TK: Tensor, batch: Batch) -> Tensor:
    mask_BS = mask_of(batch)
    return slow_sequence_loss(scores_TE.unflatten(0, mask_BS.shape), mask_BS, TOP_K)


def explicit_batch(scores_TE: Tensor, ids_TK: Tensor, batch: Batch) -> Tensor:
    mask_T = mask_of(batch).flatten()
    load_E = torch.bincount(ids_TK[mask_T].flatten(), minlength=scores_TE.shape[1]).tolist()
    return slow_batch_loss(scores_TE[mask_T], load_E, TOP_K)


KINDS = {"sequence_loss_alpha": explicit_sequence, "batch_loss_alpha": explicit_batch}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overrides", [{}, GROUP_LIMITED], ids=["plain", "group limit"])
def test_gradient_is_that_of_the_written_out_loss(overrides: dict[str, int], kind: str, checkpointing: str) -> None:
    batches = [tiny_batch(1, 3, 5, padding=[0, 2, 1])]
    plain = trained(parallelize(make_model(1, **overrides), ep_degree=1), batches)
    model = parallelize(make_model(1, checkpointing=checkpointing, **overrides), ep_degree=1, **{kind: ALPHA})
    expected = explicit(make_model(1, **overrides), batches, lambda *a: ALPHA * KINDS[kind](*a))
    assert_adds(trained(model, batches), plain, expected)


def test_both_losses_add_up() -> None:
    batches = [tiny_batch(2, 2, 5)]
    plain = trained(parallelize(make_model(2), ep_degree=1), batches)
    model = parallelize(make_model(2), ep_degree=1, sequence_loss_alpha=1.0, batch_loss_alpha=3.0)
    expected = explicit(make_model(2), batches, lambda *a: explicit_sequence(*a) + 3 * explicit_batch(*a))
    assert_adds(trained(model, batches), plain, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", ["none", "reentrant"])
def test_loss_is_scaled_as_the_models_is(checkpointing: str, kind: str) -> None:
    """Four micro-batches, each divided by 4, as an accumulating loop or engine does."""
    batches = [tiny_batch(seed, 2, 4 + seed % 2, padding=[seed % 3, 0]) for seed in range(4)]
    plain = trained(parallelize(make_model(3), ep_degree=1), batches, divide=4)
    model = parallelize(make_model(3, checkpointing=checkpointing), ep_degree=1, **{kind: ALPHA})
    expected = explicit(make_model(3), batches, lambda *a: ALPHA / 4 * KINDS[kind](*a))
    assert_adds(trained(model, batches, divide=4), plain, expected)


def test_mean_of_sequence_losses_does_not_depend_on_the_micro_batches() -> None:
    batch = tiny_batch(4, 4, 5, padding=[1, 1, 1, 1])
    model, other = (parallelize(make_model(4), ep_degree=1, sequence_loss_alpha=ALPHA) for _ in range(2))
    whole = trained(model, [batch])
    halves = trained(other, [part(batch, i, 2) for i in range(2)], divide=2)
    for name, gradient in whole.items():
        torch.testing.assert_close(halves[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_reported_loss_and_logits_are_the_language_models(kind: str) -> None:
    batch = tiny_batch(5, 2, 5)
    plain, model = parallelize(make_model(5), ep_degree=1), parallelize(make_model(5), ep_degree=1, **{kind: ALPHA})
    assert torch.equal(plain(**batch).loss, model(**batch).loss)
    assert torch.equal(plain(**batch).logits, model(**batch).logits)


def test_losses_are_off_by_default() -> None:
    batches = [tiny_batch(6, 2, 5, padding=[0, 1])]
    default = trained(parallelize(make_model(6), ep_degree=1), batches)
    off = trained(parallelize(make_model(6), ep_degree=1, sequence_loss_alpha=0.0, batch_loss_alpha=0.0), batches)
    theirs = trained(make_model(6), batches)
    for name, gradient in theirs.items():
        assert torch.equal(default[name], off[name])
        torch.testing.assert_close(default[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_that_is_not_the_models_is_refused(kind: str, checkpointing: str) -> None:
    model = parallelize(make_model(7, checkpointing=checkpointing), ep_degree=1, **{kind: ALPHA})
    batch = tiny_batch(7, 2, 5)
    model(**batch).loss.backward()  # the scale of this one must not serve the next
    with pytest.raises(RuntimeError, match="use the loss that it returns"):
        model(input_ids=batch["input_ids"]).logits.sum().backward()


def test_evaluation_needs_no_loss_and_adds_none() -> None:
    model = parallelize(make_model(8), ep_degree=1, sequence_loss_alpha=ALPHA)
    model.eval()
    model(input_ids=tiny_batch(8, 2, 5)["input_ids"]).logits.sum().backward()


def test_coefficients_below_zero_are_refused() -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"must be >= 0, got .*-0\.1"):
            parallelize(make_model(9), ep_degree=1, **{kind: -0.1})
