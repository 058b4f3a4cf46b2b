"""Compiled causal attention against the formula in float64, and against transformers' own in a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import tiny_model
from torch import Tensor

from alfb_dist import cpu
from alfb_dist.cpu.attention import MAX_LENGTH, PIECE, causal_attention
from alfb_dist.engine.attention import NAME, choose_attention

pytestmark = pytest.mark.skipif(not cpu.has_attention(), reason="no C compiler")


def heads(batches: int, heads: int, length: int, width: int, seed: int) -> Tensor:
    """Return (B, H, S, W) as a view of (B, S, H, W), as models do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batches, length, heads, width, generator=generator).transpose(1, 2)


def formula(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return softmax(scale q k^T) v without the later positions: (B, S, H, V)."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = scale * query @ key.mT
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def run(fn: Any, inputs: list[Tensor], scale: float) -> list[Tensor]:
    """Return the output and the gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = fn(*leaves, scale)
    out.backward(torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape))
    return [out.detach(), *(t.grad for t in leaves)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


SHAPES = {  # batches, heads, key-value heads, length, widths of queries and values
    "latent": (2, 4, 4, 200, 48, 64),
    "grouped": (2, 6, 2, 130, 16, 16),
    "one head for all": (1, 4, 1, 97, 24, 8),
    "a piece": (1, 2, 2, PIECE, 8, 8),
    "one more than a piece": (3, 1, 1, PIECE + 1, 5, 3),
    "two positions": (2, 2, 2, 2, 4, 7),
    "long": (1, 1, 1, 700, 32, 32),
}


@pytest.mark.parametrize("name", SHAPES)
def test_output_and_gradients_equal_the_formula(name: str, threads: int) -> None:
    batches, num_heads, kv_heads, length, width, v_width = SHAPES[name]
    inputs = [heads(batches, num_heads, length, width, 1), heads(batches, kv_heads, length, width, 2)]
    inputs.append(heads(batches, kv_heads, length, v_width, 3))
    expected = run(formula, [t.double() for t in inputs], 0.3)
    for ours, exact in zip(run(causal_attention, inputs, 0.3), expected):
        assert (ours - exact).abs().max() < 2e-6 * exact.abs().max()


def test_any_layout_of_contiguous_rows_gives_the_same_bits() -> None:
    inputs = [heads(2, 3, 50, 12, seed) for seed in range(3)]
    plain = run(causal_attention, [t.contiguous() for t in inputs], 0.2)
    wide = [torch.zeros(2, 3, 50, 40) for _ in inputs]
    for w, t in zip(wide, inputs):
        w[..., 5:17] = t
    for other in (inputs, [w[..., 5:17] for w in wide]):
        assert all(torch.equal(a, b) for a, b in zip(run(causal_attention, other, 0.2), plain))


def test_large_scores_neither_overflow_nor_leak() -> None:
    inputs = [heads(1, 2, 120, 8, seed) * factor for seed, factor in ((1, 300.0), (2, 300.0), (3, 1.0))]
    ours, theirs = (run(fn, inputs, 1.0) for fn in (causal_attention, formula))
    assert all(t.isfinite().all() for t in ours)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-3)  # scores of 1e5 are rounded to 1e-2


def test_nan_reaches_all_later_positions_and_no_earlier_one() -> None:
    inputs = [heads(1, 1, 150, 8, seed) for seed in range(3)]
    inputs[1][0, 0, 70, 3] = float("nan")
    out = causal_attention(*inputs, 0.5)
    assert not out[0, :70].isnan().any() and out[0, 70:].isnan().all()


def logits_and_gradients(model: Any, **inputs: Any) -> list[Tensor]:
    model.zero_grad()
    output = model(**inputs)
    output.logits.square().mean().backward()
    return [output.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_gives_the_same_and_with_padding_uses_transformers_own(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, calls = tiny_model(attn_implementation="sdpa"), torch.arange(60).view(2, 30) % 50, []
    mask = torch.ones_like(ids)
    mask[1, 20:] = 1 - padded
    inputs = {"input_ids": ids, "attention_mask": mask}
    exact, theirs = (logits_and_gradients(m, **inputs) for m in (copy.deepcopy(model).double(), model))
    monkeypatch.setattr(cpu, "causal_attention", lambda *a: calls.append(1) or causal_attention(*a))
    assert choose_attention(model)
    for mine, other, true in zip(logits_and_gradients(model, **inputs), theirs, exact):
        rounding = float((other - true).abs().max())  # depends on the processor
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=3 * rounding + 1e-9)
    assert len(calls) == (0 if padded else model.config.num_hidden_layers)


def test_it_replaces_sdpa_alone_and_is_not_saved(tmp_path: Path) -> None:
    eager = tiny_model(attn_implementation="eager")
    assert not choose_attention(eager) and not choose_attention(torch.nn.Linear(2, 2))
    model = tiny_model(attn_implementation="sdpa")
    assert choose_attention(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    "inputs",
    [
        [heads(1, 2, 6, 4, s).double() for s in range(3)],
        [heads(1, 2, 6, 4, s).bfloat16() for s in range(3)],
        [heads(1, 2, 1, 4, 0), heads(1, 2, 6, 4, 1), heads(1, 2, 6, 4, 2)],
        [heads(1, 2, 6, 8, s)[..., ::2] for s in range(3)],
        [heads(1, 3, 6, 4, 0), heads(1, 2, 6, 4, 1), heads(1, 2, 6, 4, 2)],
        [heads(1, 1, MAX_LENGTH + 1, 4, s) for s in range(3)],
        [heads(1, 2, 6, 4, s).to("meta") for s in range(3)],
    ],
)
def test_it_does_not_apply_to_other_types_layouts_and_sizes(inputs: list[Tensor]) -> None:
    assert causal_attention(*inputs, 1.0) is None
