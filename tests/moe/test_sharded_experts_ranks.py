"""What parallelize shards and refuses, and a single process without torch.distributed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny import (
    expert_parameters,
    full_weights,
    tiny_config,
    tiny_model,
)
from test_parallelize_ranks import DOUBLE, SETTINGS, SINGLE, assert_near
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP, DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import alfb_dist
from alfb_dist.moe.parallelize import parallelize
from alfb_dist.moe.sharded_experts import ShardedExperts, sharded_experts


def shards_on_ranks() -> dict[str, Any]:
    setting, full = SETTINGS["plain"], SETTINGS["plain"].model(SINGLE).state_dict()
    results: dict[str, Any] = {"refusals": refusals_on_rank_0() if dist.get_rank() == 0 else {}}
    for ep in (1, 2, 4):
        model = setting.model(SINGLE)
        model.eval()
        with torch.no_grad():
            untouched = copy.deepcopy(model)(input_ids=setting.batch(0)["input_ids"]).logits
        assert parallelize(model, ep_degree=ep, timeout_seconds=77) is model
        with torch.no_grad():
            evaluated = model(input_ids=setting.batch(0)["input_ids"]).logits
        shards, state = sharded_experts(model), model.state_dict()
        grid = shards[0][1].grid
        results[f"EP {ep}"] = {
            "names": list(state) == list(full),
            "shapes": {k: (tuple(v.shape), tuple(full[k].shape)) for k, v in state.items() if v.shape != full[k].shape},
            "bits": all(torch.equal(state[k], full[k]) for k in full if state[k].shape == full[k].shape),
            "first of shard": {k: state[k].flatten()[0].item() for k in state if "mlp.experts" in k},
            "gathered": all(torch.equal(w, full[k]) for k, w in full_weights(model).items()),
            "storage": all(p.untyped_storage().nbytes() == p.nbytes for p in expert_parameters(model)),
            "marks": {(p.allreduce, p.group_name) for p in expert_parameters(model)},
            "repr": repr(shards[0][1]),
            "ranks": (
                dist.get_process_group_ranks(grid.ep_group),
                dist.get_process_group_ranks(grid.expert_data_group),
            ),
            "timeout": grid.ep_group._get_backend(torch.device("cpu")).options._timeout.total_seconds(),
            "evaluated": (evaluated - untouched).abs().max().item(),
            "copy": copied_model_trains(model),
        }
    return results


def copied_model_trains(model: nn.Module) -> bool:
    """A deep copy is on the same ranks, trains, and shares no parameter."""
    twin = copy.deepcopy(model).train()
    twin(**SETTINGS["plain"].batch(dist.get_rank())).loss.backward()
    apart = all(p.grad is None and p is not q for p, q in zip(model.parameters(), twin.parameters()))
    return apart and all(q.grad is not None for q in twin.parameters())


def refusals_on_rank_0() -> dict[str, str]:
    """Each is refused on one rank alone, where any collective would wait for the others."""
    texts = {}

    def refuse(name: str, model: nn.Module, **arguments: Any) -> None:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        try:
            parallelize(model, **arguments)
        except ValueError as e:
            texts[name] = str(e)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    refuse("world", tiny_model(), ep_degree=3)
    refuse("experts", tiny_model(n_routed_experts=6), ep_degree=4)
    refuse("no bias", nn.Sequential(DeepseekV3MLP(tiny_config())), ep_degree=2)
    refuse("zero", tiny_model(), ep_degree=0)
    refuse("float", tiny_model(), ep_degree=2.0)
    refuse("text", tiny_model(), ep_degree="2")
    refuse("alpha", tiny_model(), ep_degree=2, batch_loss_alpha=-1.0)
    unfused = tiny_model()
    unfused.model.layers[2].mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    refuse("unfused", unfused, ep_degree=2)
    return texts


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(4, shards_on_ranks, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_only_the_first_dimension_of_the_experts_is_cut(shards: list[dict[str, Any]], ep: int) -> None:
    full = SETTINGS["plain"].model(SINGLE).state_dict()
    for rank, result in enumerate(shards):
        seen = result[f"EP {ep}"]
        assert seen["names"] and seen["bits"] and seen["gathered"]
        cut = {k: ((v.shape[0] // ep, *v.shape[1:]), tuple(v.shape)) for k, v in full.items() if "mlp.experts" in k}
        assert len(cut) == 4 and seen["shapes"] == (cut if ep > 1 else {})
        first = rank % ep * (8 // ep)
        assert seen["first of shard"] == {k: full[k][first].flatten()[0].item() for k in cut}
        assert seen["repr"].endswith(
            f"(\n  experts {first} to {first + 8 // ep - 1} of 8\n  (act_fn): SiLUActivation()\n)"
        )


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_a_rank_keeps_no_memory_of_the_experts_of_others(shards: list[dict[str, Any]], ep: int) -> None:
    assert all(result[f"EP {ep}"]["storage"] for result in shards)


def test_experts_are_on_consecutive_ranks_with_our_timeout(shards: list[dict[str, Any]]) -> None:
    expected = {
        1: [([0], [0, 1, 2, 3]), ([1], [0, 1, 2, 3]), ([2], [0, 1, 2, 3]), ([3], [0, 1, 2, 3])],
        2: [([0, 1], [0, 2]), ([0, 1], [1, 3]), ([2, 3], [0, 2]), ([2, 3], [1, 3])],
        4: [([0, 1, 2, 3], [0]), ([0, 1, 2, 3], [1]), ([0, 1, 2, 3], [2]), ([0, 1, 2, 3], [3])],
    }
    for ep, by_rank in expected.items():
        assert [result[f"EP {ep}"]["ranks"] for result in shards] == by_rank
        assert {result[f"EP {ep}"]["timeout"] for result in shards} == {77.0}
        assert all(result[f"EP {ep}"]["marks"] == {(False, f"ep_size_{ep}")} for result in shards)


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_evaluation_of_a_sharded_model_equals_the_whole_one(shards: list[dict[str, Any]], ep: int) -> None:
    assert all(result[f"EP {ep}"]["evaluated"] < 1e-5 for result in shards)


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_copy_of_a_sharded_model_trains(shards: list[dict[str, Any]], ep: int) -> None:
    assert all(result[f"EP {ep}"]["copy"] for result in shards)


def test_refusals_come_before_any_collective_and_name_both_numbers(shards: list[dict[str, Any]]) -> None:
    assert shards[0]["refusals"] == {
        "world": "the world size (4) must be divisible by ep_degree (3)",
        "experts": "num_experts (6) of model.layers.1.mlp must be divisible by ep_degree (4)",
        "no bias": "Sequential has no MoE block with a gate that carries a selection bias",
        "zero": "ep_degree must be an integer >= 1, got 0",
        "float": "ep_degree must be an integer >= 1, got 2.0",
        "text": "ep_degree must be an integer >= 1, got '2'",
        "alpha": "batch_loss_alpha must be >= 0, got -1.0",
        "unfused": "model.layers.2.mlp.experts (ModuleList) are not fused SwiGLU experts (gate_up_proj, down_proj)",
    }


# In a single process, without torch.distributed.


def test_single_process_needs_no_torch_distributed() -> None:
    assert not dist.is_initialized()
    setting = SETTINGS["group limit of negative biased scores"]
    model, plain = alfb_dist.parallelize(setting.model(DOUBLE), ep_degree=1), setting.model(DOUBLE)
    ours, expected = model(**setting.batch(1)), plain(**setting.batch(1))
    ours.loss.backward(), expected.loss.backward()
    assert_near(ours.logits.detach(), expected.logits.detach(), DOUBLE, "logits")
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters()):
        assert_near(p.grad, q.grad, DOUBLE, name)


def test_single_process_cannot_shard() -> None:
    with pytest.raises(ValueError, match=r"world size \(1\) must be divisible by ep_degree \(2\)"):
        parallelize(tiny_model(), ep_degree=2)


def test_second_time_is_refused() -> None:
    model = parallelize(tiny_model(), ep_degree=1)
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM is parallelised already"):
        parallelize(model, ep_degree=1)


def test_frozen_experts_stay_frozen() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.experts.down_proj.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in parallelize(model, ep_degree=1).named_parameters()}
    assert [n for n, flag in flags.items() if not flag] == ["model.layers.1.mlp.experts.down_proj"]


class TwoKinds(nn.Module):
    """A block with a selection bias and one without."""

    def __init__(self) -> None:
        super().__init__()
        small = {"hidden_size": 24, "intermediate_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
        self.balanced = DeepseekV3MoE(tiny_config())
        self.unbiased = MixtralSparseMoeBlock(MixtralConfig(**small, experts_implementation="eager"))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.unbiased(self.balanced(x))


def test_block_without_bias_is_unchanged_if_another_has_one() -> None:
    model, plain = parallelize(TwoKinds().double(), ep_degree=1), TwoKinds().double()
    assert [name for name, _ in sharded_experts(model)] == ["balanced.experts"]
    assert not isinstance(model.unbiased.experts, ShardedExperts)
    x = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    model(x).sum().backward()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    assert int(model.balanced.gate.pending_load_E.sum()) == 5 * 4
