"""The grouped experts' compute: its arithmetic on any device, its kernels on a CUDA device if there is one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from support.grouped_cases import ACT, CASES, NAMES, assert_equals_reference, make_case, outcome, rounded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from alfb_dist.moe import experts
from alfb_dist.moe.experts import expert_mlp, grouped, grouped_gemm
from alfb_dist.moe.experts.slots import sort_slots

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def grouped_mlp(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: Any, **kw: Any) -> Tensor:
    return grouped.GroupedMLP.apply(x, weights, gate_up, down, ids, *kw.values())


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nothing has written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_reference(name: str, dtype: torch.dtype, poison: None) -> None:
    case = rounded(CASES[name](), dtype)
    assert_equals_reference(outcome(grouped_mlp, case), case, dtype)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cuda_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    case = rounded(CASES[name](), dtype)
    assert_equals_reference(outcome(expert_mlp, case, "cuda"), case, dtype)


@pytest.mark.cuda
@needs_cuda
def test_cuda_gives_the_same_bits_twice_and_does_not_wait() -> None:
    case = rounded(make_case(0, 5000, 16, 4, 256, 128), torch.bfloat16)
    first = outcome(expert_mlp, case, "cuda")
    x, ids, *rest = (t.cuda() for t in case)
    if torch.cuda.get_device_capability()[0] in (9, 10):
        torch.cuda.set_sync_debug_mode("error")
        try:
            expert_mlp(x.requires_grad_(), ids, *rest, ACT).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name, value in outcome(expert_mlp, case, "cuda").items():
        assert torch.equal(value, first[name]), name


def test_slots_are_sorted_by_expert_and_empty_slots_have_no_place() -> None:
    ids_RK = torch.tensor([[2, 3], [0, 2], [3, 0]])  # three experts; 3 is empty
    slots = sort_slots(ids_RK, 3)
    assert slots.ends_e.tolist() == [2, 2, 4]
    assert slots.slot_S.tolist()[:4] == [2, 5, 0, 3]
    assert slots.place_RK.tolist() == [[2, -1], [0, 3], [-1, 1]]
    assert {t.dtype for t in slots} == {torch.int32}
    assert sort_slots(ids_RK, 3, 4).slot_S.tolist() == [2, 5, 0, 3]


@pytest.mark.parametrize("num_experts", [3, 255, 256, 300, 40_000])
def test_slots_of_many_experts_keep_their_ids(num_experts: int) -> None:
    ids_RK = torch.randint(num_experts + 1, (50, 4), generator=torch.Generator().manual_seed(num_experts))
    ids_RK[3, 1], ids_RK[4, 2] = num_experts, num_experts - 1
    slots = sort_slots(ids_RK, num_experts)
    counts = torch.bincount(ids_RK.flatten(), minlength=num_experts + 1)
    assert torch.equal(slots.ends_e.long(), counts.cumsum(0)[:-1])
    sorted_ids = ids_RK.flatten()[slots.slot_S.long()]
    assert torch.equal(sorted_ids, sorted_ids.sort()[0])


def test_places_for_the_filled_slots_are_enough(poison: None) -> None:
    case = rounded(make_case(3, 50, 6, 4, 16, 8), torch.bfloat16)
    filled = int((case[1] < 6).sum())
    assert filled < case[1].numel()
    all_places, few_places = outcome(grouped_mlp, case), outcome(grouped_mlp, case, num_places=filled)
    assert all(torch.equal(all_places[name], few_places[name]) for name in NAMES)


def test_rows_may_come_in_any_order() -> None:
    x, ids, weights, *parameters = rounded(make_case(4, 40, 6, 3, 16, 8), torch.bfloat16)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    out = grouped_mlp(x, ids, weights, *parameters, ACT)
    assert torch.equal(grouped_mlp(x[order], ids[order], weights[order], *parameters, ACT), out[order])


def test_transposed_and_shifted_parameters_give_the_same() -> None:
    x, ids, weights, gate_up, down = rounded(make_case(5, 40, 6, 3, 16, 8), torch.bfloat16)
    expected = outcome(grouped_mlp, [x, ids, weights, gate_up, down])
    transposed = [p.transpose(1, 2).contiguous().transpose(1, 2) for p in (gate_up, down)]
    shifted = [torch.cat([p.new_zeros(3), p.flatten()])[3:].view_as(p) for p in (gate_up, down)]
    for others in (transposed, shifted):
        leaves = [p.detach().requires_grad_() for p in others]
        out = grouped_mlp(x, ids, weights, *leaves, ACT)
        assert torch.equal(out, expected["out"])
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out))
        assert torch.equal(leaves[0].grad, expected["gate_up_e2FD"])
        assert torch.equal(leaves[1].grad, expected["down_eDF"])


@pytest.mark.parametrize("needed", list(product([True, False], repeat=4))[:-1])
def test_only_what_is_trained_gets_a_gradient(needed: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = rounded(make_case(6, 30, 4, 2, 16, 8), torch.float32), []
    expected = outcome(grouped_mlp, case)
    monkeypatch.setattr(grouped, "grouped_outer", lambda *a: calls.append(1) or grouped_gemm.grouped_outer(*a))
    x, ids, *rest = case
    leaves = [t.clone().requires_grad_(trained) for t, trained in zip((x, *rest), needed)]
    out = grouped_mlp(leaves[0], ids, *leaves[1:], ACT)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out))
    for name, leaf, trained in zip(NAMES[1:], leaves, needed):
        assert torch.equal(leaf.grad, expected[name]) if trained else leaf.grad is None, name
    assert len(calls) == sum(needed[2:])


class NoWaiting(TorchDispatchMode):
    """Raises RuntimeError where the host would wait for a value or a size from the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(func.name().startswith((f"aten::{name}", f"aten::_{name}")) for name in self.WAITS):
            raise RuntimeError(f"{func.name()} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["a third of the slots empty", "experts without rows", "all slots empty"])
def test_the_host_never_waits_for_the_device(name: str) -> None:
    case = rounded(CASES[name](), torch.bfloat16)
    with NoWaiting():
        x, ids, *rest = case
        leaves = [t.clone().requires_grad_() for t in (x, *rest)]
        grouped_mlp(leaves[0], ids, *leaves[1:], ACT).backward(torch.ones_like(x))
    assert all(leaf.grad is not None for leaf in leaves)
    with NoWaiting(), pytest.raises(RuntimeError, match="waits for the device"):
        experts.plain_mlp(case[0], case[1], *case[2:], ACT)


def empty_case(device: str) -> list[Tensor]:
    """Return x, ids, weights, gate_up and down with the types of a bfloat16 model."""
    half, width, inner = {"dtype": torch.bfloat16, "device": device}, 64, 32
    return [
        torch.empty(30, width, **half),
        torch.empty(30, 4, dtype=torch.int64, device=device),
        torch.empty(30, 4, device=device),
        torch.empty(6, 2 * inner, width, **half),
        torch.empty(6, width, inner, **half),
    ]


def test_torchs_checks_of_cuda_products_pass() -> None:
    """Of types, strides and alignment, on meta tensors, which also have no value to wait for."""
    x, ids, *rest = empty_case("meta")
    leaves = [t.requires_grad_() for t in (x, *rest)]
    grouped_mlp(leaves[0], ids, *leaves[1:], ACT).backward(torch.empty_like(x))
    for leaf in leaves:
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)
    with pytest.raises(RuntimeError, match="16 bytes"):  # the checks run on meta tensors
        torch._grouped_mm(x[:, :63].contiguous(), rest[1].transpose(1, 2)[:, :63], offs=ids[:6, 0].int())


def test_unaligned_rows_do_not_reach_torchs_kernel() -> None:
    ends_e, flat = torch.tensor([2, 5], dtype=torch.int32), torch.randn(1000)
    rows, matrices = flat[:40].view(5, 8), flat[:128].view(2, 8, 8)
    for a, b in ((rows, matrices), (flat[1:41].view(5, 8), matrices), (rows, flat[1:129].view(2, 8, 8))):
        aligned = a.storage_offset() % 4 == 0 and b.storage_offset() % 4 == 0
        assert grouped_gemm._fit(a, b, 8, 8) == aligned
    assert not grouped_gemm._fit(rows, matrices, 8, 9)
    assert not grouped_gemm._fit(rows[:0], matrices, 8, 8)
    expected = torch.cat([rows[:2] @ matrices[0], rows[2:] @ matrices[1]])
    for form in (rows, rows.clone().as_strided((5, 8), (8, 1)), torch.cat([flat[:1], rows.flatten()])[1:].view(5, 8)):
        torch.testing.assert_close(grouped_gemm.grouped_mm(form, matrices, ends_e), expected)


def test_grouped_products_are_for_cuda_and_silu() -> None:
    with FakeTensorMode():
        x, _, *rest = empty_case("cuda")
        assert grouped.supported(x, *rest, ACT)
        assert not grouped.supported(x.float(), *rest, ACT)
        assert not grouped.supported(x, *rest, torch.nn.GELU())
    x, _, *rest = empty_case("cpu")
    assert not grouped.supported(x, *rest, ACT)


def test_the_form_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    experts._log_once.cache_clear()
    x, ids, *rest = make_case(0, 4, 3, 2, 8, 4)
    with caplog.at_level(logging.INFO, logger="alfb_dist.moe.experts"):
        for _ in range(3):
            expert_mlp(x.double(), ids, *(t.double() for t in rest), ACT)
    messages = [r.message for r in caplog.records if "the experts' compute" in r.message]
    assert messages == ["the experts' compute: plain torch, expert by expert"]
