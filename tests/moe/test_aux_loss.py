"""The auxiliary losses against their formulas written out, as values and as gradients of a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny import GROUP_LIMITED, gates, part, random_biases, set_biases, tiny_batch, tiny_model
from torch import Tensor, nn

from alfb_dist.balance.aux_loss import LossScale, attach, batch_loss, sequence_loss
from alfb_dist.moe.parallelize import parallelize

Batch = dict[str, Tensor]
TOP_K = 4
CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}


def slow_sequence_loss(scores_BSE: Tensor, mask_BS: Tensor, top_k: int) -> Tensor:
    """The mean over sequences of sum_i f_i P_i, token by token."""
    num_experts, total = scores_BSE.shape[2], scores_BSE.sum() * 0
    for scores_SE, mask_S in zip(scores_BSE, mask_BS):
        tokens = [s_E for s_E, real in zip(scores_SE, mask_S.tolist()) if real]
        for i in range(num_experts if tokens else 0):
            chosen = sum(i in sorted(range(num_experts), key=lambda j: -s_E[j].item())[:top_k] for s_E in tokens)
            f_i = num_experts / (top_k * len(tokens)) * chosen
            total = total + f_i * sum(s_E[i] / s_E.sum() for s_E in tokens) / len(tokens)
    return total / len(scores_BSE)


def slow_batch_loss(scores_TE: Tensor, load_E: list[int], top_k: int) -> Tensor:
    """sum_i f_i P_i over unpadded tokens, with f_i from the choices that were really made."""
    num_tokens, num_experts = scores_TE.shape
    assert sum(load_E) == top_k * num_tokens
    return sum(num_experts * n / (top_k * num_tokens) * scores_TE[:, i].mean() for i, n in enumerate(load_E))


def rand(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Values.


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


# Gradients through a whole model.


def make_model(seed: int, *, checkpointing: str = "none", **overrides: Any) -> nn.Module:
    model = tiny_model(seed, **overrides).double()
    set_biases(model, random_biases(model, seed))
    for gate in gates(model):
        gate.e_score_correction_bias.data = gate.e_score_correction_bias.data.float()
    if CHECKPOINTING[checkpointing] is not None:
        model.activation_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    return model


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


def mask_of(batch: Batch) -> Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def explicit_sequence(scores_TE: Tensor, ids_TK: Tensor, batch: Batch) -> Tensor:
    mask_BS = mask_of(batch)
    return slow_sequence_loss(scores_TE.unflatten(0, mask_BS.shape), mask_BS, TOP_K)


def explicit_batch(scores_TE: Tensor, ids_TK: Tensor, batch: Batch) -> Tensor:
    mask_T = mask_of(batch).flatten()
    load_E = torch.bincount(ids_TK[mask_T].flatten(), minlength=scores_TE.shape[1]).tolist()
    return slow_batch_loss(scores_TE[mask_T], load_E, TOP_K)


KINDS = {"sequence_loss_alpha": explicit_sequence, "batch_loss_alpha": explicit_batch}
ALPHA = 2.0


def assert_adds(with_loss: dict[str, Tensor], without: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The difference of the gradients is the expected one, to the float32 of the gates."""
    reached = 0
    for name, gradient in expected.items():
        difference, size = with_loss[name] - without[name], gradient.norm().item()
        assert (difference - gradient).norm() <= 3e-5 * size + 1e-6, name
        reached += size > 1e-3
    assert reached > 10  # gates, and all that lies before them


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


def test_attached_loss_gets_the_scale_and_the_weights_keep_their_gradient() -> None:
    weights, parameter, scale = torch.ones(2, requires_grad=True), torch.tensor(3.0, requires_grad=True), LossScale()
    carried = attach(weights, parameter * 5, scale)
    assert torch.equal(carried, weights)
    (scale.of((carried * torch.tensor([1.0, 2.0])).sum()) * 0.25).backward()
    assert weights.grad.tolist() == [0.25, 0.5]
    assert parameter.grad.item() == 5 * 0.25
