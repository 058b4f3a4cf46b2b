"""The bias keeps its bits whatever the model is cast to, and moves only with what is trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.tiny import (
    SharedGate,
    biases,
    counted_model,
    expected_load,
    gate_outputs,
    gates,
    pending,
    plain_model,
    random_biases,
    set_biases,
    tiny_batch,
    tiny_model,
    train_on,
)
from torch import nn

from alfb_dist.engine.balancer import Balancer
from alfb_dist.moe.parallelize import parallelize, watch

# The bias keeps its bits.

ODD_BIASES = torch.tensor([[0.1, 1 / 3, -5.000001, 35.123456, 1e-8, -0.0, 2**-20, 0.5000001]] * 2)
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "double()": lambda m: m.double(),
    "to(dtype)": lambda m: m.to(torch.bfloat16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
    "there and back": lambda m: m.bfloat16().float().half().double().float(),
    "to(device)": lambda m: m.to("cpu"),
}


@pytest.mark.parametrize("cast", CASTS)
def test_bias_stays_float32_with_all_its_bits(cast: str) -> None:
    model = counted_model()
    set_biases(model, ODD_BIASES)
    CASTS[cast](model)
    for gate in gates(model):
        assert gate.e_score_correction_bias.dtype == gate.bias_E.dtype == torch.float32
        assert gate.state_dict()["e_score_correction_bias"].dtype == torch.float32
    assert torch.equal(biases(model).view(torch.int32), ODD_BIASES.view(torch.int32))


@pytest.mark.parametrize("cast", ["bfloat16()", "half()", "double()"])
def test_everything_else_is_cast(cast: str) -> None:
    model = CASTS[cast](counted_model())
    dtype = {"bfloat16()": torch.bfloat16, "half()": torch.float16, "double()": torch.float64}[cast]
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_bias_of_a_model_that_is_bfloat16_already_becomes_float32() -> None:
    model = tiny_model()
    set_biases(model, ODD_BIASES)
    model.bfloat16()
    watch(model)
    assert biases(model).dtype == torch.float32
    assert torch.equal(biases(model), ODD_BIASES.bfloat16().float())


def test_cast_bias_still_moves() -> None:
    """1,000 moves of 0.001 in a bfloat16 model end at 1, not at the 0.5 where bfloat16 stalls."""
    model = SharedGate()
    balancer = Balancer(model, rate=1e-3)
    model.bfloat16()
    for _ in range(1000):
        model.first.gate.add_load(torch.tensor([8, 0, 4, 4]))
        balancer.step()
    torch.testing.assert_close(balancer.bias_LE, torch.tensor([[-1.0, 1.0, 0.0, 0.0]]), rtol=1e-4, atol=0)


def test_bfloat16_model_routes_with_the_float32_bias() -> None:
    """Expert 1 leads by 2**-12 of bias alone, which bfloat16 would lose next to 5."""
    model = SharedGate()
    watch(model)
    model.bfloat16()
    model.first.gate.bias_E.copy_(torch.tensor([5.0, 5.0 + 2**-12, 0.0, 0.0]))
    model(torch.zeros(3, 4).bfloat16(), torch.zeros(2, 4).bfloat16()).backward()
    assert model.first.gate.pending_load_E.tolist() == [0, 5, 0, 0]


def test_bfloat16_model_trains_and_counts_as_transformers_routes() -> None:
    model, plain, batch = counted_model(13).bfloat16(), plain_model(13).bfloat16(), tiny_batch(13, 3, 7)
    for gate, bias in zip(gates(plain), random_biases(plain, 13)):
        gate.e_score_correction_bias = bias  # as transformers keeps it when it loads a model
    train_on(model, batch)
    assert torch.equal(pending(model), expected_load(plain, batch))
    for ours, theirs in zip(gate_outputs(model, batch), gate_outputs(plain, batch)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_bias_of_a_frozen_teacher_stays_and_the_students_moves() -> None:
    teacher, student = parallelize(tiny_model(1), ep_degree=1), parallelize(tiny_model(2), ep_degree=1)
    teacher.requires_grad_(False)
    balancer, before = Balancer(student, rate=0.01), biases(teacher)
    batch = tiny_batch(0, 2, 8)
    for _ in range(3):
        with torch.no_grad():
            target = teacher(**batch).logits
        (student(**batch).logits - target).square().mean().backward()
        balancer.step()
    assert torch.equal(biases(teacher), before)
    assert balancer.bias_LE.abs().sum() > 0
