"""The gate's logits with their compiled backward, against torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alfb_dist import cpu
from alfb_dist.balance.router import float32_logits
from alfb_dist.moe.routing import gate_logits

pytestmark = pytest.mark.skipif(not cpu.has_kernels(), reason="no C compiler")


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
    assert type(logits_TE.grad_fn).__name__ == "_LogitsBackward"
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
