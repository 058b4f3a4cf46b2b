"""What of a gate is compiled, against torch: all to the bit but the logits' backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alfb_dist.balance.router import RouterSpec, combine_weights
from alfb_dist.moe import weighing
from alfb_dist.moe.families.probe import float32_logits
from alfb_dist.moe.weighing import Commit, Weighing, gate_logits, supported

pytestmark = pytest.mark.skipif(weighing.library() is None, reason="no C compiler on this machine")


class Loads(list[Tensor]):
    def add_load(self, load_E: Tensor) -> None:
        self.append(load_E)


def case(num_tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """scores, distinct ids, and a gradient of the weights."""
    generator = torch.Generator().manual_seed(num_tokens)
    scores_TE = torch.rand(num_tokens, num_experts, generator=generator)
    ids_TK = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    return scores_TE, ids_TK, torch.randn(num_tokens, top_k, generator=generator)


@pytest.mark.parametrize("num_tokens", [0, 1, 300])
@pytest.mark.parametrize("scaling", [1.0, 2.5, 1.7])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (16, 3), (16, 4), (64, 6), (256, 8)])
def test_weights_gradient_and_load_equal_torchs_to_the_bit(
    num_experts: int, top_k: int, normalize: bool, scaling: float, num_tokens: int
) -> None:
    spec = RouterSpec(top_k, normalize=normalize, scaling=scaling)
    scores_TE, ids_TK, grad_TK = case(num_tokens, num_experts, top_k)
    if not supported(scores_TE, top_k):
        assert top_k > 4, "so few numbers have the same order on every processor"
        pytest.skip(f"this processor's torch adds up {top_k} numbers in another order")
    graph_TE, ours_TE = scores_TE.clone().requires_grad_(), scores_TE.clone().requires_grad_()
    expected_TK = combine_weights(graph_TE, ids_TK, spec)
    weights_TK, load_E = Weighing.apply(ours_TE, ids_TK, spec, None)
    expected_TK.backward(grad_TK)
    weights_TK.backward(grad_TK)
    assert torch.equal(weights_TK, expected_TK)
    assert torch.equal(ours_TE.grad, graph_TE.grad)
    assert torch.equal(load_E, torch.bincount(ids_TK.flatten(), minlength=num_experts))


@pytest.mark.parametrize(
    ("top_k", "beside", "order"),
    [
        (3, 1, "0 1 2"),
        (6, 1, "0 1 2 3 4 5"),
        (6, 4, "0+4+5 1 2 3"),
        (8, 4, "0+4 1+5 2+6 3+7"),
        (11, 4, "0+4+8+9+10 1+5 2+6 3+7"),
    ],
)
def test_sums_are_taken_in_the_order_asked_for(top_k: int, beside: int, order: str) -> None:
    scores_TE, ids_TK, _ = case(300, 16, top_k)
    chosen_TK = scores_TE.gather(1, ids_TK)
    total_T = torch.zeros(300)
    for group in order.split():
        part_T = torch.zeros(300)
        for k in map(int, group.split("+")):
            part_T = part_T + chosen_TK[:, k]
        total_T = total_T + part_T
    weights_TK, _ = Weighing.apply(scores_TE, ids_TK, RouterSpec(top_k), None, beside)
    assert torch.equal(weights_TK, chosen_TK / (total_T[:, None] + 1e-20))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value: float) -> None:
    scores_TE, ids_TK, grad_TK = case(20, 8, 2)
    scores_TE[3, ids_TK[3, 0]] = value
    graph_TE, ours_TE = scores_TE.clone().requires_grad_(), scores_TE.clone().requires_grad_()
    expected_TK = combine_weights(graph_TE, ids_TK, RouterSpec(2))
    weights_TK, _ = Weighing.apply(ours_TE, ids_TK, RouterSpec(2), None)
    for weights, leaf in ((expected_TK, graph_TE), (weights_TK, ours_TE)):
        weights.backward(grad_TK)
        assert leaf.grad[3].isnan().any()
    assert torch.equal(weights_TK.isnan(), expected_TK.isnan())
    assert torch.equal(ours_TE.grad.isnan(), graph_TE.grad.isnan())


def test_strided_scores_and_gradients_are_read_rightly() -> None:
    scores_TE, ids_TK, grad_TK = case(30, 8, 4)
    graph_TE, ours_TE = scores_TE.clone().requires_grad_(), scores_TE.clone().requires_grad_()
    one_TK = combine_weights(graph_TE.T.contiguous().T, ids_TK.T.contiguous().T, RouterSpec(4))
    two_TK, _ = Weighing.apply(ours_TE.T.contiguous().T, ids_TK.T.contiguous().T, RouterSpec(4), None)
    for weights in (one_TK, two_TK):
        weights.backward(grad_TK.T.contiguous().T)
    assert torch.equal(one_TK, two_TK) and torch.equal(ours_TE.grad, graph_TE.grad)


def test_the_load_counts_with_the_first_backward_and_with_no_other() -> None:
    scores_TE, ids_TK, _ = case(5, 8, 2)
    commit = Commit(gate := Loads(), torch.ones(8))
    weights_TK, _ = Weighing.apply(scores_TE.requires_grad_(), ids_TK, RouterSpec(2), commit)
    counts = [len(gate)]
    for _ in range(2):
        weights_TK.sum().backward(retain_graph=True)
        counts.append(len(gate))
    assert counts == [0, 1, 1]


def test_a_second_derivative_is_refused() -> None:
    scores_TE, ids_TK, _ = case(5, 8, 2)
    weights_TK, _ = Weighing.apply(scores_TE.requires_grad_(), ids_TK, RouterSpec(2), None)
    (grad_TE,) = torch.autograd.grad(weights_TK.square().sum(), scores_TE, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_TE.sum().backward()


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_other_types_go_through_torch(kind: Any) -> None:
    assert not supported(torch.zeros(3, 8, dtype=kind), 2)


@pytest.mark.parametrize(("tokens", "experts", "width"), [(37, 5, 12), (1, 1, 1), (300, 64, 70), (0, 4, 8)])
@pytest.mark.parametrize("frozen", ["nothing", "tokens", "weight"])
def test_logits_are_torchs_and_their_gradients_the_products(tokens: int, experts: int, width: int, frozen: str) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x_TD, weight_ED, grad_TE = (
        torch.randn(shape, generator=generator) for shape in ((tokens, width), (experts, width), (tokens, experts))
    )
    x_TD.requires_grad_(frozen != "tokens")
    weight_ED.requires_grad_(frozen != "weight")
    logits_TE = gate_logits(x_TD.view(1, tokens, width), weight_ED)
    assert torch.equal(logits_TE, nn.functional.linear(x_TD, weight_ED))
    logits_TE.backward(grad_TE)
    expected = {"x": grad_TE.double() @ weight_ED.double(), "weight": grad_TE.double().T @ x_TD.double()}
    for name, leaf in (("x", x_TD), ("weight", weight_ED)):
        if leaf.requires_grad:
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad.double(), expected[name], rtol=1e-5, atol=1e-5 * tokens**0.5)
        else:
            assert leaf.grad is None


def test_logits_under_autocast_are_the_familys() -> None:
    x_TD, weight_ED = torch.randn(300, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    gradients = []
    for logits in (gate_logits, float32_logits):
        with torch.autocast("cpu", torch.bfloat16):
            gradients.append(torch.autograd.grad(logits(x_TD, weight_ED).float().square().sum(), (x_TD, weight_ED)))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_logits_of_what_is_not_contiguous_keep_their_bits(num_tokens: int) -> None:
    x_TD, weight_ED = torch.randn(512, num_tokens).T, torch.randn(512, 64).T
    assert torch.equal(gate_logits(x_TD, weight_ED), float32_logits(x_TD, weight_ED))
