"""A parallelised model against transformers' own: output, loss and every gradient for EP 1, 2 and 4."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny import (
    GROUP_LIMITED,
    expected_load,
    full_gradients,
    gates,
    random_biases,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from alfb_dist.moe.parallelize import parallelize

Ranks = Callable[..., list[Any]]
SINGLE, DOUBLE = torch.float32, torch.float64


class Setting(NamedTuple):
    """A model, its biases and what each rank trains on: different numbers of tokens, some of them padding."""

    seed: int = 0
    overrides: dict[str, Any] = {}  # noqa: RUF012
    biases: tuple[float, float] = (-0.2, 0.2)
    checkpointing: bool | None = None  # use_reentrant

    def model(self, dtype: torch.dtype) -> nn.Module:
        model = tiny_model(self.seed, **self.overrides).to(dtype)
        low, high = self.biases
        for gate, bias_E in zip(gates(model), random_biases(model, self.seed + 1, low=low, high=high)):
            gate.e_score_correction_bias = bias_E
        if self.checkpointing is not None:
            model.activation_checkpointing_enable({"use_reentrant": self.checkpointing})
        return model

    def batch(self, rank: int) -> dict[str, Tensor]:
        sequences = 1 + (self.seed + rank) % 3
        return tiny_batch(100 * self.seed + rank, sequences, 3 + rank, padding=[rank % 2] * sequences)


MAIN = {
    "plain": Setting(),
    "group limit of negative biased scores": Setting(1, GROUP_LIMITED, (-3.0, -1.5)),
    "all tokens on few experts": Setting(2, {}, (-100.0, 100.0)),
    "reentrant recompute": Setting(3, GROUP_LIMITED, (-0.2, 0.2), True),
}
FURTHER = {
    "negative biased scores": Setting(4, {}, (-3.0, -1.5)),
    "released biases": Setting(5, {}, (5.0, 35.0)),
    "recompute": Setting(6, {}, (-0.2, 0.2), False),
    "top 1 of 4": Setting(7, {"n_routed_experts": 4, "num_experts_per_tok": 1}),
    "all of 4": Setting(8, {"n_routed_experts": 4}),
    "gelu": Setting(9, {"hidden_act": "gelu"}),
    "odd sizes": Setting(10, {"n_routed_experts": 12, "num_experts_per_tok": 5, "moe_intermediate_size": 7}),
    "not normalised": Setting(11, {"norm_topk_prob": False, "routed_scaling_factor": 1.3}),
    "two shared": Setting(12, {"n_shared_experts": 2, "num_hidden_layers": 4, "first_k_dense_replace": 2}),
}
SETTINGS = MAIN | FURTHER
RUNS = {1: (1,), 2: (1, 2), 4: (2, 4)}
"""Expert-parallel degrees by number of ranks."""
CASES = [
    (name, world, ep, dtype) for name in MAIN for world in RUNS for ep in RUNS[world] for dtype in (DOUBLE, SINGLE)
] + [(name, 4, 2, DOUBLE) for name in FURTHER]


def run_setting(setting: Setting, ep: int, dtype: torch.dtype) -> dict[str, Any]:
    model = parallelize(setting.model(dtype), ep_degree=ep)
    output = model(**setting.batch(dist.get_rank()))
    output.loss.backward()
    return {
        "logits": output.logits.detach(),
        "loss": output.loss.detach(),
        "load": torch.stack([g.pending_load_E for g in gates(model)]),
        "gradients": full_gradients(model),
    }


def run_settings() -> dict[tuple[str, int, torch.dtype], dict[str, Any]]:
    return {
        (name, ep, dtype): run_setting(SETTINGS[name], ep, dtype)
        for name, world, ep, dtype in CASES
        if world == dist.get_world_size()
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """results(world): by rank, what `run_settings` returned; run once per world size."""
    return functools.cache(lambda world: run_ranks(world, run_settings, folder=tmp_path_factory.mktemp("ranks")))


@functools.cache
def theirs(name: str, world: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """transformers' own model in float64: each rank's output and load, and the gradient of the sum of the losses."""
    model, outputs = SETTINGS[name]._replace(checkpointing=None).model(DOUBLE), []
    for rank in range(world):
        batch = SETTINGS[name].batch(rank)
        output = model(**batch)
        output.loss.backward()
        load_LE = expected_load(model, batch)
        outputs.append({"logits": output.logits.detach(), "loss": output.loss.detach(), "load": load_LE})
    # An expert that no token chose has no gradient at transformers' or a zero one.
    return outputs, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Tight in float64; in float32 within rounding of the tensor's norm."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    tolerance = 1e-12 if dtype == DOUBLE else 5e-6
    error = (actual.double() - expected).norm().item()
    assert error <= tolerance * (1 + expected.norm().item()), f"{what} is off by {error:.1e} of {expected.norm():.1e}"


@pytest.mark.parametrize(
    ("name", "world", "ep", "dtype"), CASES, ids=[f"{n}, EP {e} of {w}, {d}" for n, w, e, d in CASES]
)
def test_output_loss_and_every_gradient_equal_transformers(
    results: Ranks, name: str, world: int, ep: int, dtype: torch.dtype
) -> None:
    outputs, gradients = theirs(name, world)
    for rank, result in enumerate(results(world)):
        ours = result[name, ep, dtype]
        assert_near(ours["logits"], outputs[rank]["logits"], dtype, f"logits of rank {rank}")
        torch.testing.assert_close(ours["loss"], outputs[rank]["loss"], rtol=1e-6, atol=0)  # transformers': float32
        assert torch.equal(ours["load"], outputs[rank]["load"])
    ours = results(world)[0][name, ep, dtype]["gradients"]
    assert list(ours) == list(gradients)
    for parameter, gradient in gradients.items():
        assert_near(ours[parameter], gradient, dtype, parameter)


def test_settings_reach_what_they_are_for() -> None:
    """Negative biased scores, a group limit that binds, and an expert-parallel rank without any row."""
    model = SETTINGS["group limit of negative biased scores"].model(DOUBLE)
    assert max(g.e_score_correction_bias.max() for g in gates(model)) + 1 < 0
    few = theirs("all tokens on few experts", 4)[0]
    totals = sum(output["load"] for output in few)
    assert (totals.unflatten(1, (4, 2)).sum(2) == 0).any()  # one of four ranks owns only idle experts in some layer


# One block alone.


def block_on_ranks() -> list[dict[str, Any]]:
    """transformers' block in float64 and a copy sharded by EP 1, 2, 4; rank 0 has no token at all."""
    rank, results = dist.get_rank(), []
    for overrides in ({}, GROUP_LIMITED):
        whole = make_block(overrides)
        x_TD, gradient_TD = block_inputs(rank)
        for ep in RUNS[dist.get_world_size()]:
            block, x = parallelize(copy.deepcopy(whole), ep_degree=ep), x_TD.clone().requires_grad_()
            out = block(x[None])
            out.backward(gradient_TD[None])
            results.append(
                {
                    "out": out.detach()[0],
                    "x grad": x.grad,
                    "gradients": full_gradients(block),
                    "load": block.gate.pending_load_E,
                }
            )
    return results


def make_block(overrides: dict[str, int]) -> DeepseekV3MoE:
    block, generator = DeepseekV3MoE(tiny_config(**overrides)).double(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=DOUBLE) * 0.3)
        block.gate.e_score_correction_bias = torch.rand(block.gate.num_experts, generator=generator) - 2.5
    return block


def block_inputs(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x_TD, gradient_TD = torch.randn(2, 5 * rank, 24, generator=generator, dtype=DOUBLE)
    return x_TD, gradient_TD


@pytest.mark.parametrize("world", [2, 4])
def test_block_equals_transformers_block_even_if_a_rank_has_no_tokens(ranks: Ranks, world: int) -> None:
    by_rank, case = ranks(world, block_on_ranks), 0
    for overrides in ({}, GROUP_LIMITED):
        whole, expected = make_block(overrides), []
        for rank in range(world):
            x_TD, gradient_TD = block_inputs(rank)
            out = whole(x_TD.requires_grad_()[None])
            out.backward(gradient_TD[None])
            expected.append((out.detach()[0], x_TD.grad))
        for _ in RUNS[world]:
            for (out, x_grad), result in zip(expected, by_rank):
                assert_near(result[case]["out"], out, DOUBLE, "output")
                assert_near(result[case]["x grad"], x_grad, DOUBLE, "gradient of the input")
                for name, p in whole.named_parameters():
                    assert_near(result[case]["gradients"][name], p.grad, DOUBLE, name)
            assert [int(result[case]["load"].sum()) for result in by_rank] == [5 * rank * 4 for rank in range(world)]
            case += 1
