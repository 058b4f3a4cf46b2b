"""The compiled kernels against the reference in float64, and what happens without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.grouped_cases import make_case
from torch import Tensor, nn

from alfb_dist import cpu
from alfb_dist.cpu import build
from alfb_dist.cpu import experts as cpu_experts
from alfb_dist.moe.experts import expert_mlp, expert_mlp_reference
from alfb_dist.moe.experts.plain import plain_mlp

ACT = nn.SiLU()
needs_compiler = pytest.mark.skipif(not cpu.has_kernels(), reason="no C compiler")


def results(function: object, case: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradients of x, weights, gate_up and down, in float64."""
    x, ids, *rest = case
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, *rest)]
    out = function(leaves[0], ids, *leaves[1:], ACT)  # type: ignore[operator]
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(dtype))
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]  # type: ignore[union-attr]


SHAPES = [
    (37, 5, 3, 12, 8),  # no multiple of a vector
    (1, 4, 2, 8, 4),
    (0, 4, 2, 8, 4),
    (300, 8, 4, 64, 32),
    (64, 128, 8, 16, 8),  # experts without rows
]


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_output_and_gradients_equal_the_reference(shape: tuple[int, ...], seed: int) -> None:
    case = make_case(seed, *shape)
    for ours, expected in zip(
        results(expert_mlp, case, torch.float32), results(expert_mlp_reference, case, torch.float64)
    ):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


@needs_compiler
@pytest.mark.parametrize("piece_rows", [1, 7, 512])
def test_an_expert_with_more_rows_than_a_piece_gives_the_same(piece_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(0, 600, 3, 2, 16, 8, hot=True)
    monkeypatch.setattr(cpu_experts, "PIECE_ROWS", piece_rows)
    for ours, expected in zip(
        results(expert_mlp, case, torch.float32), results(expert_mlp_reference, case, torch.float64)
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("frozen", [(0,), (2,), (3,), (4,), (0, 2, 3), (3, 4)])
def test_frozen_inputs_change_no_other_gradient(frozen: tuple[int, ...]) -> None:
    case = make_case(5, 60, 4, 2, 20, 12)
    wanted = [i for i in (0, 2, 3, 4) if i not in frozen]
    gradients = []
    for leaves in ((0, 2, 3, 4), wanted):
        tensors = [t.clone().requires_grad_(i in leaves) for i, t in enumerate(case) if i != 1]
        out = expert_mlp(tensors[0], case[1], *tensors[1:], ACT)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        gradients.append([t.grad for i, t in zip((0, 2, 3, 4), tensors) if i in wanted])
    assert all(map(torch.equal, *gradients))


@needs_compiler
def test_results_of_two_threads_equal_those_of_one() -> None:
    case, before = make_case(1, 700, 2, 2, 192, 96), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(expert_mlp, case, torch.float32)
        torch.set_num_threads(2)
        two = results(expert_mlp, case, torch.float32)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, two):  # the products themselves may sum in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_results_of_their_row_alone(value: float) -> None:
    case = make_case(2, 20, 4, 2, 12, 8)
    case[0][3, 5] = value
    out, grad_x, *_ = results(expert_mlp, case, torch.float32)
    touched = (case[1] < 4).any(1).nonzero().flatten().tolist()
    assert bool(out[3].isfinite().all()) == (3 not in touched)
    assert bool(out[[r for r in range(20) if r != 3]].isfinite().all())
    assert bool(grad_x[3].isfinite().all()) == (3 not in touched)


@needs_compiler
@pytest.mark.parametrize("wrong", [-1, 5])
def test_ids_out_of_range_raise(wrong: int) -> None:
    x, ids, *rest = make_case(0, 6, 4, 2, 8, 4)
    ids[3, 1] = wrong
    with pytest.raises(IndexError, match=r"expert ids must be in \[0, 4\]"):
        expert_mlp(x, ids, *rest, ACT)


@needs_compiler
def test_denormal_numbers_stay_after_loading_the_kernels() -> None:
    assert cpu.has_kernels()
    assert 5e-324 * 1.0 != 0  # linked with -ffast-math, the library would make the whole process flush these to zero
    assert float(torch.tensor(1e-39) * 0.5) != 0


@needs_compiler
def test_large_gates_saturate_as_silu_does() -> None:
    x_R1 = torch.tensor([-1000.0, -90, -20, -1, -1e-3, 0, 1e-3, 1, 20, 90, 1000])[:, None]
    ids_R1, ones_R1 = torch.zeros(11, 1, dtype=torch.int64), torch.ones(11, 1)
    gate_up = torch.tensor([[[1.0], [0.0]]]) + torch.tensor([[[0.0], [1.0]]])  # gate = up = x
    out = expert_mlp(x_R1, ids_R1, ones_R1, gate_up, torch.ones(1, 1, 1), ACT)
    torch.testing.assert_close(out, nn.functional.silu(x_R1) * x_R1, rtol=2e-6, atol=1e-30)


@needs_compiler
def test_kernels_agree_with_plain_torch_and_are_what_runs() -> None:
    case = make_case(3, 50, 6, 3, 20, 12)
    for a, b in zip(results(expert_mlp, case, torch.float32), results(plain_mlp, case, torch.float32)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    x, ids, *rest = case
    assert type(expert_mlp(x.requires_grad_(), ids, *rest, ACT).grad_fn).__name__ == "_ExpertMLPBackward"


def test_second_derivatives_are_refused() -> None:
    x, ids, weights, gate_up, down = make_case(6, 10, 4, 2, 8, 4)
    shared = (gate_up[0, :4].contiguous(), gate_up[0, 4:].contiguous(), down[0])
    for function in (
        lambda x: cpu.expert_mlp(x, ids, weights, gate_up, down),
        lambda x: cpu.shared_mlp(x, *shared),
        lambda x: cpu.gate_logits(x, gate_up[0]),
    ):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_other_types_and_activations_go_through_plain_torch() -> None:
    x, ids, *rest = make_case(4, 10, 4, 2, 8, 4)
    assert cpu.expert_mlp(x.double(), ids, *(t.double() for t in rest)) is None
    assert type(expert_mlp(x.requires_grad_(), ids, *rest, nn.GELU()).grad_fn).__name__ == "_PlainMLPBackward"


@pytest.mark.parametrize("variables", [{"ALFB_NATIVE": "0"}, {"PATH": "/nowhere", "CC": "none"}])
def test_without_a_compiler_plain_torch_runs(variables: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import torch; from alfb_dist import cpu; from alfb_dist.moe.experts import expert_mlp;"
        "assert not cpu.has_kernels();"
        "x = torch.ones(3, 4, requires_grad=True);"
        "out = expert_mlp(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), torch.ones(2, 4, 4),"
        " torch.ones(2, 4, 2), torch.nn.SiLU()); out.sum().backward(); print(out[0, 0].item())"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(2 * 4 * nn.functional.silu(torch.tensor(4.0)).item(), rel=1e-5)


@needs_compiler
def test_compiled_code_is_kept_until_its_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "answer.c"
    for value in (41, 42):
        source.write_text(f"int answer(void) {{ return {value}; }}")
        library = build.load(source)
        assert library is not None
        assert library.answer() == value
    assert len(list((tmp_path / "cache" / "alfb_dist").glob("answer-*.so"))) == 2
    source.write_text("this is not C")
    assert build.load(source) is None
