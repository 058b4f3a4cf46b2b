"""The experts' compute against a loop over rows and slots in float64: output, gradients, idle experts, types."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from alfb_dist.moe.experts import expert_mlp, expert_mlp_reference
from alfb_dist.moe.experts.reference import is_silu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.SiLU(),
    "transformers silu": ACT2FN["silu"],
    "gelu": nn.GELU(),
    "silu function": nn.functional.silu,
    "relu squared": lambda x: x.relu().square(),
}
DTYPE = torch.float64


class Case(NamedTuple):
    x_RD: Tensor
    ids_RK: Tensor
    weights_RK: Tensor
    gate_up_e2FD: Tensor
    down_eDF: Tensor


def make_case(seed: int, *, rows: int = 11, experts: int = 5, top_k: int = 3, width: int = 6, inner: int = 4) -> Case:
    """Distinct ids per row, about a third of the slots empty (id = experts, weight 0); expert 1 never has a row."""
    generator = torch.Generator().manual_seed(seed)
    ids_RK = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(rows)])
    empty_RK = (torch.rand(rows, top_k, generator=generator) < 0.33) | (ids_RK == 1)
    weights_RK = torch.rand(rows, top_k, generator=generator, dtype=DTYPE).masked_fill(empty_RK, 0)
    return Case(
        torch.randn(rows, width, generator=generator, dtype=DTYPE),
        ids_RK.masked_fill(empty_RK, experts),
        weights_RK,
        torch.randn(experts, 2 * inner, width, generator=generator, dtype=DTYPE),
        torch.randn(experts, width, inner, generator=generator, dtype=DTYPE),
    )


def one_takes_all(seed: int) -> Case:
    case = make_case(seed)
    ids_RK, weights_RK = torch.full_like(case.ids_RK, 5), torch.zeros_like(case.weights_RK)
    ids_RK[:, 1], weights_RK[:, 1] = 3, case.weights_RK.sum(1) + 0.1
    return case._replace(ids_RK=ids_RK, weights_RK=weights_RK)


def all_empty(seed: int) -> Case:
    case = make_case(seed)
    return case._replace(ids_RK=torch.full_like(case.ids_RK, 5), weights_RK=torch.zeros_like(case.weights_RK))


def no_rows(seed: int) -> Case:
    case = make_case(seed)
    return case._replace(x_RD=case.x_RD[:0], ids_RK=case.ids_RK[:0], weights_RK=case.weights_RK[:0])


CASES: dict[str, Callable[[int], Case]] = {
    "mixed": make_case,
    "one expert takes all": one_takes_all,
    "all slots empty": all_empty,
    "no rows": no_rows,
    "one row": lambda seed: make_case(seed, rows=1),
    "top 1": lambda seed: make_case(seed, top_k=1),
    "one expert here": lambda seed: make_case(seed, experts=1, top_k=1),
    "all experts": lambda seed: make_case(seed, top_k=5),
}


def loop(case: Case, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute row by row and slot by slot, one vector at a time."""
    num_experts, inner = case.gate_up_e2FD.shape[0], case.down_eDF.shape[2]
    out = []
    for x_D, ids, weights in zip(case.x_RD, case.ids_RK.tolist(), case.weights_RK):
        row_D = x_D * 0
        for i, weight in zip(ids, weights):
            if i < num_experts:
                both = case.gate_up_e2FD[i] @ x_D
                row_D = row_D + weight * (case.down_eDF[i] @ (act(both[:inner]) * both[inner:]))
        out.append(row_D)
    return torch.stack(out) if out else case.x_RD * 0


def with_gradients(fn: Callable[..., Tensor], case: Case, act: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the output and the gradients of a random projection of it, without those that are None."""
    leaves = [x.clone().requires_grad_() for x in (case.x_RD, case.weights_RK, case.gate_up_e2FD, case.down_eDF)]
    x_RD, weights_RK, gate_up_e2FD, down_eDF = leaves
    out_RD = fn(x_RD, case.ids_RK, weights_RK, gate_up_e2FD, down_eDF, act)
    generator = torch.Generator().manual_seed(99)
    out_RD.backward(torch.randn(out_RD.shape, generator=generator, dtype=DTYPE).to(out_RD.dtype))
    names = ("x_RD", "weights_RK", "gate_up_e2FD", "down_eDF")
    return {"out": out_RD.detach()} | {n: x.grad for n, x in zip(names, leaves) if x.grad is not None}


def loop_with_gradients(case: Case, act: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the loop's results, with zeros for gradients that are None; an empty slot's weight has none."""
    result = with_gradients(lambda x, ids, w, g, d, act: loop(Case(x, ids, w, g, d), act), case, act)
    for name in ("x_RD", "weights_RK", "gate_up_e2FD", "down_eDF"):
        result.setdefault(name, torch.zeros_like(getattr(case, name)))
    return result


@pytest.mark.parametrize("act_name", ACTIVATIONS)
@pytest.mark.parametrize("case_name", CASES)
def test_output_and_gradients_equal_the_loop(case_name: str, act_name: str) -> None:
    act = ACTIVATIONS[act_name]
    for seed in range(2):
        case = CASES[case_name](seed)
        fast, expected = with_gradients(expert_mlp, case, act), loop_with_gradients(case, act)
        assert fast.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(fast[name], value, rtol=1e-12, atol=1e-13, msg=f"{name} differs")


@pytest.mark.parametrize("case_name", [name for name in CASES if name != "no rows"])
def test_reference_equals_the_loop(case_name: str) -> None:
    case = CASES[case_name](3)
    slow, expected = with_gradients(expert_mlp_reference, case, nn.SiLU()), loop_with_gradients(case, nn.SiLU())
    for name, value in expected.items():
        torch.testing.assert_close(slow[name], value, rtol=1e-12, atol=1e-13, msg=f"{name} differs")


@pytest.mark.parametrize("act_name", ["silu", "gelu"])
def test_gradients_pass_gradcheck(act_name: str) -> None:
    case = make_case(5, rows=4, experts=3, top_k=2, width=3, inner=2)
    inputs = [x.clone().requires_grad_() for x in (case.x_RD, case.weights_RK, case.gate_up_e2FD, case.down_eDF)]

    def fn(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return expert_mlp(x, case.ids_RK, weights, gate_up, down, ACTIVATIONS[act_name])

    assert torch.autograd.gradcheck(fn, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_transformers_silu_takes_the_same_path_as_torchs() -> None:
    assert (
        is_silu(ACTIVATIONS["transformers silu"]) and is_silu(ACTIVATIONS["silu"]) and not is_silu(ACTIVATIONS["gelu"])
    )


@pytest.mark.parametrize("case_name", ["no rows", "all slots empty"])
def test_idle_experts_have_zero_gradients_and_not_none(case_name: str) -> None:
    case = CASES[case_name](0)
    result = with_gradients(expert_mlp, case, nn.SiLU())
    assert result["out"].shape == case.x_RD.shape and not result["out"].any()
    for name in ("x_RD", "weights_RK", "gate_up_e2FD", "down_eDF"):
        assert result[name].shape == getattr(case, name).shape and not result[name].any()


def test_only_experts_with_rows_have_nonzero_gradients() -> None:
    case = one_takes_all(2)
    result = with_gradients(expert_mlp, case, nn.SiLU())
    for name in ("gate_up_e2FD", "down_eDF"):
        assert [bool(g.any()) for g in result[name]] == [False, False, False, True, False]


@pytest.mark.parametrize("seed", range(3))
def test_rows_may_come_in_any_order(seed: int) -> None:
    case = make_case(seed)
    order = torch.randperm(len(case.x_RD), generator=torch.Generator().manual_seed(seed))
    slots = torch.randperm(case.ids_RK.shape[1], generator=torch.Generator().manual_seed(seed + 1))
    shuffled = case._replace(
        x_RD=case.x_RD[order], ids_RK=case.ids_RK[order][:, slots], weights_RK=case.weights_RK[order][:, slots]
    )
    out = expert_mlp(*case, nn.SiLU())
    torch.testing.assert_close(expert_mlp(*shuffled, nn.SiLU()), out[order], rtol=1e-12, atol=1e-13)


def test_renumbered_experts_give_the_same_output() -> None:
    case = make_case(4)
    order = torch.tensor([3, 0, 4, 2, 1])  # new expert i is old expert order[i]
    new_id = torch.cat([order.argsort(), torch.tensor([5])])
    renamed = case._replace(
        ids_RK=new_id[case.ids_RK], gate_up_e2FD=case.gate_up_e2FD[order], down_eDF=case.down_eDF[order]
    )
    torch.testing.assert_close(expert_mlp(*renamed, nn.SiLU()), expert_mlp(*case, nn.SiLU()), rtol=1e-12, atol=1e-13)


def test_output_is_linear_in_the_weights() -> None:
    case = make_case(6)
    doubled = expert_mlp(*case._replace(weights_RK=2 * case.weights_RK), nn.SiLU())
    assert torch.equal(doubled, 2 * expert_mlp(*case, nn.SiLU()))


def test_output_without_gradients_is_the_same_to_the_bit() -> None:
    case = make_case(7)
    with torch.no_grad():
        out = expert_mlp(*case, nn.SiLU())
    assert not out.requires_grad
    assert torch.equal(out, with_gradients(expert_mlp, case, nn.SiLU())["out"])


def test_frozen_experts_still_pass_gradients_to_their_rows() -> None:
    case = make_case(8)
    expected = loop_with_gradients(case, nn.SiLU())
    x_RD = case.x_RD.clone().requires_grad_()
    out_RD = expert_mlp(x_RD, case.ids_RK, case.weights_RK, case.gate_up_e2FD, case.down_eDF, nn.SiLU())
    out_RD.backward(torch.randn(out_RD.shape, generator=torch.Generator().manual_seed(99), dtype=DTYPE))
    torch.testing.assert_close(x_RD.grad, expected["x_RD"], rtol=1e-12, atol=1e-13)


def lowered(case: Case, dtype: torch.dtype) -> Case:
    """Return the case with rows and parameters in a smaller type and weights in float32, as the router returns them."""
    return Case(
        case.x_RD.to(dtype), case.ids_RK, case.weights_RK.float(), case.gate_up_e2FD.to(dtype), case.down_eDF.to(dtype)
    )


def in_float64(case: Case) -> Case:
    return Case(case.x_RD.double(), case.ids_RK, *(x.double() for x in (case.weights_RK, *case[3:])))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-6), (torch.float32, 2**-20)])
@pytest.mark.parametrize("act_name", ["silu", "gelu"])
def test_smaller_types_are_within_their_rounding_of_float64(
    act_name: str, dtype: torch.dtype, tolerance: float
) -> None:
    case = lowered(make_case(9, rows=64, width=32, inner=16), dtype)
    got = with_gradients(expert_mlp, case, ACTIVATIONS[act_name])
    expected = with_gradients(expert_mlp_reference, in_float64(case), ACTIVATIONS[act_name])
    assert {name: x.dtype for name, x in got.items()} == {
        "out": dtype,
        "x_RD": dtype,
        "weights_RK": torch.float32,
        "gate_up_e2FD": dtype,
        "down_eDF": dtype,
    }
    for name, value in expected.items():
        filled = (case.ids_RK < 5) if name == "weights_RK" else slice(None)
        error, norm = (got[name].double() - value)[filled].norm(), value[filled].norm()
        assert error <= tolerance * norm, f"{name}: {error / norm:.2e} of its norm"


def test_bfloat16_sums_over_slots_are_rounded_once() -> None:
    """256 + 1 - 256 over three slots is 1; a sum in bfloat16 would make it 0."""
    weights = torch.tensor([[256.0, 1.0, -256.0]])
    one = torch.ones(3, 2, 1, dtype=torch.bfloat16)
    out = expert_mlp(
        torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([[0, 1, 2]]), weights, one, one[:, :1], nn.Identity()
    )
    assert out.tolist() == [[1.0]]
