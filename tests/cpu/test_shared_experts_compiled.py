"""Compiled shared experts against the family's own in float64, and when the family's own run."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MLP

from alfb_dist import cpu
from alfb_dist.cpu.shared_experts import _SharedMLP
from alfb_dist.moe.mixin import mix
from alfb_dist.moe.shared_experts import CompiledShared

pytestmark = pytest.mark.skipif(not cpu.has_kernels(), reason="no C compiler")


def family(width: int = 20, inner: int = 12, seed: int = 0) -> DeepseekV3MLP:
    torch.manual_seed(seed)
    return DeepseekV3MLP(DeepseekV3Config(hidden_size=width, intermediate_size=inner))


def compiled(module: nn.Module) -> Any:
    made = copy.deepcopy(module)
    mix(made, CompiledShared)
    return made


def results(module: nn.Module, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradients of x and of the weights, in float64."""
    x = x.to(dtype, copy=True).requires_grad_()
    out = module(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(dtype))
    return [t.double() for t in (out.detach(), x.grad, *(p.grad for p in module.parameters()))]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("rows", "width", "inner"), [(1, 1, 1), (37, 12, 7), (600, 64, 32), (1100, 33, 130), (6, 8, 4)]
)
@pytest.mark.parametrize("seed", range(2))
def test_output_and_gradients_equal_the_familys(rows: int, width: int, inner: int, seed: int) -> None:
    module = family(width, inner, seed)
    x = torch.randn(2, rows, width)
    for ours, expected in zip(results(compiled(module), x, torch.float32), results(module.double(), x, torch.float64)):
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6 * max(scale, 1))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernels_run_and_threads_change_no_bit(threads: int) -> None:
    module, before = compiled(family(128, 96)), torch.get_num_threads()
    x = torch.randn(300, 128)
    one = results(module, x, torch.float32)
    module.zero_grad()
    try:
        torch.set_num_threads(threads)
        again = results(module, x, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert type(module(x.requires_grad_()).grad_fn.next_functions[0][0]).__name__ == "_SharedMLPBackward"
    assert all(map(torch.equal, one, again))


def test_the_weights_addresses_change_no_bit() -> None:
    """Some ways of loading leave gate and up adjacent in memory, others do not."""
    apart, x = compiled(family(96, 40)), torch.randn(70, 96)
    adjacent, both = copy.deepcopy(apart), torch.empty(2, 40, 96)
    for part, name in zip(both, ("gate_proj", "up_proj")):
        linear = getattr(adjacent, name)
        linear.weight = nn.Parameter(part.copy_(linear.weight.detach()))
    assert adjacent.up_proj.weight.data_ptr() == adjacent.gate_proj.weight.data_ptr() + 40 * 96 * 4
    assert all(map(torch.equal, results(apart, x, torch.float32), results(adjacent, x, torch.float32)))


def test_no_rows_give_zero_gradients() -> None:
    module = compiled(family())
    module(torch.zeros(0, 20, requires_grad=True)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_tensors_that_are_not_contiguous_and_frozen_weights() -> None:
    module, x = family(), torch.randn(20, 9).T
    ours = compiled(module)
    grad = torch.randn(20, 9).T
    module(x).backward(grad)
    for frozen in itertools.product([False, True], repeat=3):
        for linear, still in zip((ours.gate_proj, ours.up_proj, ours.down_proj), frozen):
            linear.weight.requires_grad_(not still)
            linear.weight.grad = None
        leaf = x.clone().requires_grad_(all(frozen) or not any(frozen))
        ours(leaf).backward(grad)
        for name in ("gate_proj", "up_proj", "down_proj"):
            mine, theirs = getattr(ours, name).weight, getattr(module, name).weight
            assert (mine.grad is None) != mine.requires_grad
            if mine.requires_grad:
                torch.testing.assert_close(mine.grad, theirs.grad)
        if leaf.requires_grad:
            again = x.clone().requires_grad_()
            module(again).backward(grad, inputs=[again])
            torch.testing.assert_close(leaf.grad, again.grad)


def test_other_types_and_autocast_run_the_familys(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = family(), torch.randn(5, 20)
    ours = compiled(module)
    monkeypatch.setattr(_SharedMLP, "apply", None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), module(x))
    assert torch.equal(ours.bfloat16()(x.bfloat16()), module.bfloat16()(x.bfloat16()))
    assert torch.equal(ours.double()(x.double()), module.double()(x.double()))


def test_tracing_and_transforms_run_the_familys() -> None:
    module, x = family(), torch.randn(5, 20)
    ours = compiled(module)
    torch.testing.assert_close(torch.compile(ours, backend="eager", fullgraph=True)(x), module(x))
    torch.testing.assert_close(
        torch.func.grad(lambda x: ours(x).sum())(x), torch.func.grad(lambda x: module(x).sum())(x)
    )
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert ours(mode.from_tensor(x)).shape == x.shape
    torch.testing.assert_close(ours(x[0]), module(x[0]))
    torch.testing.assert_close(ours(x=x), module(x=x))
