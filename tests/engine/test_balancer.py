"""The Balancer without a model's forward: loads are added to the gates, on ranks that disagree and in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny import (
    biases,
    gates,
    set_biases,
    tiny_config,
)
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

import alfb_dist
from alfb_dist.balance.update_rule import rate_schedule
from alfb_dist.engine.balancer import Balancer


def two_layers() -> nn.Module:
    return nn.ModuleList(DeepseekV3MoE(tiny_config(n_routed_experts=4)) for _ in range(2))


def add(balancer: Balancer, *loads: list[int]) -> None:
    for gate, load in zip(balancer.gates, loads):
        gate.add_load(torch.tensor(load))


def disagreements() -> dict[str, Any]:
    rank, model = dist.get_rank(), two_layers()
    set_biases(model, torch.full((2, 4), float(rank)) + torch.tensor([0.1, 0.2, 0.3, 1 / 3]))
    balancer = Balancer(model, rate=0.5)
    seen: dict[str, Any] = {"start": biases(model)}

    # Loads beyond what float32 counts exactly, and none in the second layer.
    if rank == 1:
        add(balancer, [2**24 + 1, 2**24, 2**24, 2**24 - 1])
    else:
        add(balancer, [2**24, 2**24, 2**24, 2**24])
    calls, inner = [], dist.all_reduce
    dist.all_reduce = lambda *a, **k: (calls.append(a[0].dtype), inner(*a, **k))[1]
    balancer.step()
    dist.all_reduce = inner
    seen["calls"] = calls
    seen["global load"], seen["global bias"] = balancer.load_LE, balancer.bias_LE

    # Not applied, on all ranks: dropped.
    add(balancer, [9, 0, 0, 0], [0, 0, 0, 9])
    seen["skipped"] = balancer.step(applied=False)
    seen["skipped load"], seen["skipped bias"] = balancer.load_LE, balancer.bias_LE
    seen["skipped steps"] = balancer.num_steps

    # Ranks that disagree.
    add(balancer, [9, 0, 0, 0], [0, 0, 0, 9])
    try:
        balancer.step(applied=rank != 1)
        seen["error"] = ""
    except RuntimeError as e:
        seen["error"] = str(e)
    seen["error load"], seen["error bias"] = balancer.load_LE, balancer.bias_LE

    # The next step does not see the dropped loads.
    add(balancer, [1, 0, 0, 0], [0, rank, 0, 0])
    seen["next"] = balancer.step(applied=True)
    seen["next load"], seen["next bias"] = balancer.load_LE, balancer.bias_LE
    return seen


@pytest.fixture(scope="module")
def disagreed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, disagreements, folder=tmp_path_factory.mktemp("ranks"))


START = torch.tensor([[0.1, 0.2, 0.3, 1 / 3]] * 2)


def test_biases_start_as_the_first_ranks(disagreed: list[dict[str, Any]]) -> None:
    assert all(torch.equal(seen["start"], START) for seen in disagreed)


def test_one_integer_all_reduce_serves_all_layers(disagreed: list[dict[str, Any]]) -> None:
    assert all(seen["calls"] == [torch.int64] for seen in disagreed)


def test_loads_are_summed_over_ranks_exactly(disagreed: list[dict[str, Any]]) -> None:
    """A difference of one token in 2**25 moves the bias; a layer without load stays."""
    move = torch.tensor([[-0.5, 0.0, 0.0, 0.5], [0.0] * 4])
    for seen in disagreed:
        assert seen["global load"].tolist() == [[2**25 + 1, 2**25, 2**25, 2**25 - 1], [0] * 4]
        assert torch.equal(seen["global bias"], START + move)


def test_skipped_step_drops_its_loads_and_leaves_bias_and_load(disagreed: list[dict[str, Any]]) -> None:
    for seen in disagreed:
        assert seen["skipped"] is False and seen["skipped steps"] == 1
        assert torch.equal(seen["skipped load"], seen["global load"])
        assert torch.equal(seen["skipped bias"], seen["global bias"])


def test_ranks_that_disagree_about_the_step_fail_on_every_rank(disagreed: list[dict[str, Any]]) -> None:
    for seen in disagreed:
        assert seen["error"] == "1 of 2 ranks applied the optimizer step, the others did not"
        assert torch.equal(seen["error bias"], seen["global bias"])
        assert torch.equal(seen["error load"], seen["global load"])


def test_step_after_a_skipped_one_is_normal(disagreed: list[dict[str, Any]]) -> None:
    move = torch.tensor([[-0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, 0.5]])
    for seen in disagreed:
        assert seen["next"] is True
        assert seen["next load"].tolist() == [[2, 0, 0, 0], [0, 1, 0, 0]]
        assert torch.equal(seen["next bias"], seen["global bias"] + move)


def in_groups() -> tuple[Tensor, Tensor]:
    """Two halves of the ranks balance a copy of the model each."""
    rank, model = dist.get_rank(), two_layers()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    set_biases(model, torch.full((2, 4), float(rank)))
    balancer = Balancer(model, rate=0.25, group=groups[rank // 2])
    add(balancer, [rank, 0, 0, 0], [0, 1, 0, 0])
    balancer.step()
    return balancer.bias_LE, balancer.load_LE


def test_group_is_the_ranks_that_balance_together(tmp_path_factory: pytest.TempPathFactory) -> None:
    move = torch.tensor([[-0.25, 0.25, 0.25, 0.25], [0.25, -0.25, 0.25, 0.25]])
    for rank, (bias_LE, load_LE) in enumerate(run_ranks(4, in_groups, folder=tmp_path_factory.mktemp("ranks"))):
        assert torch.equal(bias_LE, rank // 2 * 2.0 + move)
        assert load_LE.tolist() == [[rank // 2 * 4 + 1, 0, 0, 0], [0, 2, 0, 0]]


# In a single process.


def test_public_name_is_the_class() -> None:
    assert alfb_dist.Balancer is Balancer


def test_nothing_has_happened_at_first() -> None:
    balancer = Balancer(two_layers())
    assert balancer.load_LE.tolist() == [[0] * 4] * 2 and balancer.load_LE.dtype == torch.int64
    assert balancer.bias_LE.tolist() == [[0.0] * 4] * 2 and balancer.bias_LE.dtype == torch.float32


def test_default_is_the_papers_sign_rule() -> None:
    balancer = Balancer(two_layers())
    add(balancer, [10, 0, 0, 0], [5, 4, 3, 4])
    balancer.step()
    assert torch.equal(balancer.bias_LE, torch.tensor([[-1e-3, 1e-3, 1e-3, 1e-3], [-1e-3, 0, 1e-3, 0]]))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("rule", ["sign", "proportional", "rms"])
def test_step_is_update_bias(rule: str, centered: bool) -> None:
    model = two_layers()
    set_biases(model, torch.rand(2, 4, generator=torch.Generator().manual_seed(0)))
    balancer, before = Balancer(model, rule=rule, rate=0.03, centered=centered), biases(model)
    add(balancer, [5, 1, 3, 4], [0, 7, 7, 2])
    balancer.step()
    load_LE = torch.tensor([[5, 1, 3, 4], [0, 7, 7, 2]])
    expected = alfb_dist.update_bias(before, load_LE, rate=0.03, rule=rule, centered=centered)
    assert torch.equal(balancer.bias_LE, expected) and torch.equal(biases(model), expected)


def test_rate_zero_freezes_the_bias_and_still_shows_the_load() -> None:
    model = two_layers()
    set_biases(model, START)
    balancer = Balancer(model, rate=0)
    for step in range(3):
        add(balancer, [step, 0, 0, 0], [1, 1, 1, 1])
        assert balancer.step() is True
        assert balancer.load_LE.tolist() == [[step, 0, 0, 0], [1] * 4]
    assert torch.equal(biases(model), START)


def test_schedule_sees_the_steps_that_were_applied() -> None:
    asked = []

    def rate(step: int) -> float:
        asked.append(step)
        return 1.0 / 2**step

    balancer = Balancer(two_layers(), rate=rate)
    asked.clear()
    seen = []
    for applied in (True, False, True, True):
        add(balancer, [4, 0, 0, 0])
        balancer.step(applied=applied)
        seen.append(balancer.bias_LE[0, 1].item())
    assert asked == [0, 1, 2]
    assert seen == [1.0, 1.0, 1.5, 1.75]


def test_schedule_to_zero_freezes_the_bias_from_its_step_on() -> None:
    balancer, seen = Balancer(two_layers(), rate=rate_schedule(0.5, warmup_steps=2, zero_at_step=3)), []
    for _ in range(5):
        add(balancer, [4, 0, 0, 0])
        balancer.step()
        seen.append(balancer.bias_LE[0, 1].item())
    assert seen == [0.25, 0.75, 1.25, 1.25, 1.25]


def test_bias_is_a_copy_and_the_bias_object_of_the_gate_stays() -> None:
    model = two_layers()
    balancer, buffer = Balancer(model), model[0].gate.e_score_correction_bias
    balancer.bias_LE.add_(1)
    assert not biases(model).any()
    add(balancer, [4, 0, 0, 0])
    balancer.step()
    assert model[0].gate.e_score_correction_bias is buffer and buffer.any()


def test_bias_is_in_no_optimizer() -> None:
    model = two_layers()
    Balancer(model)
    assert not any("bias" in name for name, _ in model.named_parameters())
    assert all(not g.bias_E.requires_grad for g in gates(model))


def test_resumed_balancer_equals_an_uninterrupted_one() -> None:
    def schedule(step: int) -> float:
        return 0.1 / (step + 1)

    loads = [[[step, 3, 1, 0], [2, step, 9, 1]] for step in range(6)]
    straight = Balancer(two_layers(), rate=schedule)
    for load in loads:
        add(straight, *load)
        straight.step()
    first = Balancer(two_layers(), rate=schedule)
    for load in loads[:3]:
        add(first, *load)
        first.step()
    state = first.state_dict()
    add(first, [1, 0, 0, 0], [1, 0, 0, 0])
    first.step()  # after the save: not in it
    second = Balancer(two_layers(), rate=schedule)
    add(second, [99, 0, 0, 0], [99, 0, 0, 0])  # pending in the resumed model: dropped
    second.load_state_dict(state)
    assert second.num_steps == 3 and second.load_LE.tolist() == loads[2]
    for load in loads[3:]:
        add(second, *load)
        second.step()
    assert torch.equal(second.bias_LE.view(torch.int32), straight.bias_LE.view(torch.int32))
    assert torch.equal(second.load_LE, straight.load_LE) and second.num_steps == straight.num_steps == 6


def test_state_of_another_model_is_refused() -> None:
    state = Balancer(nn.ModuleList([DeepseekV3MoE(tiny_config())])).state_dict()
    with pytest.raises(ValueError, match=r"\(1, 8\) do not fit .* \(2, 4\)"):
        Balancer(two_layers()).load_state_dict(state)


def test_model_without_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no MoE block with a gate that carries a selection bias"):
        Balancer(nn.Linear(2, 2))


def test_layers_with_different_numbers_of_experts_are_refused() -> None:
    blocks = nn.ModuleList(DeepseekV3MoE(tiny_config(n_routed_experts=n)) for n in (4, 8))
    with pytest.raises(ValueError, match=r"same number of experts, got \[4, 8\]"):
        Balancer(blocks)


@pytest.mark.parametrize(("arguments", "text"), [({"rule": "sing"}, "got 'sing'"), ({"rate": -1.0}, "got -1.0")])
def test_rule_or_rate_that_is_not_valid_is_refused_at_once(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Balancer(two_layers(), **arguments)


class Engine(nn.Module):
    """The part of a DeepSpeed engine that a Balancer uses."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.global_steps, self.applied = module, 5, True

    def was_step_applied(self) -> bool:
        return self.applied


def in_two_calls(balancer: Balancer) -> bool:
    return balancer.update(balancer.reduce_loads())


@pytest.mark.parametrize("step", [Balancer.step, in_two_calls])
def test_engine_decides_when_a_step_is_and_whether_it_was_applied(step: Any) -> None:
    engine = Engine(two_layers())
    balancer, seen = Balancer(engine, rate=1.0), []
    # Micro-batches: first of two, second with the step, first, second with a skipped step, first, second, and again.
    for boundary, applied in [(0, True), (1, True), (0, True), (1, False), (0, True), (1, True), (0, True)]:
        add(balancer, [1, 0, 0, 0], [0, 0, 0, 1])
        engine.global_steps, engine.applied = engine.global_steps + boundary, applied
        seen.append((step(balancer), balancer.load_LE[0, 0].item(), balancer.bias_LE[0, 1].item(), balancer.num_steps))
    assert seen == [
        (False, 0, 0.0, 0),
        (True, 2, 1.0, 1),
        (False, 2, 1.0, 1),
        (False, 2, 1.0, 1),
        (False, 2, 1.0, 1),
        (True, 2, 2.0, 2),
        (False, 2, 2.0, 2),
    ]


# The two halves of a step.


def test_reduced_loads_are_the_load_of_the_step_and_the_update_moves_the_biases() -> None:
    balancer, whole = Balancer(two_layers(), rate=0.5), Balancer(two_layers(), rate=0.5)
    for loads in ([5, 1, 3, 4], [0, 7, 7, 2]), ([1, 0, 0, 0], [0, 0, 0, 1]):
        add(balancer, *loads)
        add(whole, *loads)
        before, steps = balancer.bias_LE, balancer.num_steps
        load_LE = balancer.reduce_loads()
        assert load_LE is not None and load_LE.dtype == torch.int64
        assert load_LE.tolist() == balancer.load_LE.tolist() == list(loads)
        assert torch.equal(balancer.bias_LE, before) and balancer.num_steps == steps
        assert balancer.update(load_LE) is whole.step() is True
        assert torch.equal(balancer.bias_LE, whole.bias_LE) and balancer.num_steps == whole.num_steps == steps + 1


def test_skipped_step_has_no_load_and_its_update_changes_nothing() -> None:
    balancer = Balancer(two_layers(), rate=0.5)
    add(balancer, [4, 0, 0, 0], [4, 0, 0, 0])
    balancer.step()
    bias_LE, load_LE = balancer.bias_LE, balancer.load_LE.clone()
    add(balancer, [0, 4, 0, 0], [0, 4, 0, 0])
    assert balancer.reduce_loads(applied=False) is None and balancer.update(None) is False
    assert torch.equal(balancer.bias_LE, bias_LE) and torch.equal(balancer.load_LE, load_LE)
    assert balancer.num_steps == 1


def test_load_that_has_moved_the_biases_is_refused() -> None:
    balancer = Balancer(two_layers(), rate=0.5)
    add(balancer, [4, 0, 0, 0], [4, 0, 0, 0])
    load_LE = balancer.reduce_loads()
    balancer.update(load_LE)
    bias_LE = balancer.bias_LE
    for again in (load_LE, balancer.load_LE):
        with pytest.raises(ValueError, match=r"already moved the biases: call reduce_loads\(\) after every"):
            balancer.update(again)
    assert torch.equal(balancer.bias_LE, bias_LE) and balancer.num_steps == 1
    add(balancer, [4, 0, 0, 0], [4, 0, 0, 0])
    assert balancer.step() and torch.equal(balancer.bias_LE, 2 * bias_LE)


@pytest.mark.parametrize(
    ("load_LE", "text"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), r"\(2, 4\) and load \(2, 3\)"),
        (torch.zeros(4, dtype=torch.int64), r"\(2, 4\) and load \(4,\)"),
        (torch.zeros(2, 4), "load must be int64"),
        (torch.zeros(2, 4, dtype=torch.int32), "load must be int64"),
    ],
)
def test_load_of_another_shape_or_type_is_refused(load_LE: Tensor, text: str) -> None:
    balancer = Balancer(two_layers(), rate=0.5)
    with pytest.raises(ValueError, match=text):
        balancer.update(load_LE)
    assert not balancer.bias_LE.any() and balancer.num_steps == 0
