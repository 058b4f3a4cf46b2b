"""Activation checkpointing: a recompute sees the batch that its forward saw, and chooses the experts that it chose."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny import expected_load, gates, part, random_biases, set_biases, tiny_batch, tiny_model
from support.tiny_families import batch, family_model
from support.tiny_families import expected_load as family_load
from support.tiny_families import set_biases as set_family_biases
from torch import Tensor, nn

from alfb_dist import parallelize
from alfb_dist.moe.gate import BalancedGate
from alfb_dist.moe.recompute import Recording, ReplayedCheckpoint, ReplayedTopK

MODES = {"non-reentrant": False, "reentrant": True}
FAMILIES = ["deepseek_v3", "ernie4_5_moe", "gpt_oss", "inkling_text", "llama4_text", "longcat_flash", "mixtral"]
FAMILIES += ["nemotron_h"]
"""Our routing, the family's, and the family's with a bias in its top-k; all kinds of experts."""


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # or reentrant checkpointing drops the gradients of a first layer
    return model


# One backward after several forwards.


def models(reentrant: bool, alpha: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """A model that is checkpointed, and the same without; both watched."""
    both = []
    for _ in range(2):
        model = tiny_model(4)
        set_biases(model, random_biases(model, 4))
        both.append(parallelize(model, ep_degree=1, sequence_loss_alpha=alpha))
    return checkpointed(both[0], reentrant), both[1]


PADDED = [
    tiny_batch(5, 2, 5, padding=[0, 3]),
    tiny_batch(6, 2, 5, padding=[1, 0]),
    tiny_batch(7, 3, 4, padding=[2, 0, 1]),
]
ORDERS: dict[str, Callable[[list[Tensor]], None]] = {
    "together": lambda losses: sum(losses[1:], losses[0]).backward(),
    "first to last": lambda losses: [loss.backward() for loss in losses],
    "last to first": lambda losses: [loss.backward() for loss in losses[::-1]],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batches", [PADDED, [*PADDED[1:], tiny_batch(8, 2, 5)]], ids=["padded", "last one not padded"])
def test_each_recompute_counts_by_its_own_mask(mode: str, order: str, batches: list[dict[str, Tensor]]) -> None:
    model, plain = models(MODES[mode])
    ORDERS[order]([model(**one).loss for one in batches])
    expected = sum(expected_load(plain, one) for one in batches)
    assert torch.equal(torch.stack([gate.pending_load_E for gate in gates(model)]), expected)


@pytest.mark.parametrize("mode", MODES)
def test_sequence_loss_of_a_recompute_is_that_of_its_own_batch(mode: str) -> None:
    model, plain = models(MODES[mode], alpha=0.5)
    for one in (model, plain):
        losses = [one(**padded).loss for padded in PADDED]
        sum(losses[1:], losses[0]).backward()
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_checkpointing_may_be_turned_on_later_and_off_and_a_copy_sees_its_own_batch() -> None:
    model, plain = models(reentrant=False)
    twin = copy.deepcopy(checkpointed(model, reentrant=True))
    loss = model(**PADDED[0]).loss
    twin(**PADDED[2]).loss.backward()
    loss.backward()
    for one, seen in ((model, PADDED[0]), (twin, PADDED[2])):
        loads = torch.stack([gate.pending_load_E for gate in gates(one)])
        assert torch.equal(loads, expected_load(plain, seen))
    functions = [m._gradient_checkpointing_func for m in model.model.layers[1:]]
    assert all(isinstance(f, ReplayedCheckpoint) and not isinstance(f.inner, ReplayedCheckpoint) for f in functions)
    model.activation_checkpointing_disable()
    model(**PADDED[1]).loss.backward()
    assert all(gate.batch.recording is None for gate in gates(model))


# Tokens that would choose other experts in the recompute.


def test_second_run_takes_the_ids_of_the_first_and_the_values_there() -> None:
    recording, scores = Recording(()), torch.tensor([[0.5, 0.5 - 2**-20, 0.1], [0.1, 0.2, 0.3]])
    with ReplayedTopK(recording, 3):
        first = scores.topk(1)
        scores.T.topk(1)
    recording.position, moved = 0, scores + torch.tensor([0.0, 2**-10, 0.0])
    assert moved.topk(1)[1].tolist() == [[1], [2]]
    with ReplayedTopK(recording, 3):
        second = moved.topk(1)
    assert first[1].tolist() == second[1].tolist() == [[0], [2]] and second[0].tolist() == [[0.5], [moved[1, 2].item()]]
    assert moved.topk(1)[1].tolist() == [[1], [2]] and len(recording.ids) == 1


def flipped(model: nn.Module) -> list[int]:
    """On the first rank, each gate's second run sees other tokens; [how many tokens of all gates chose otherwise]."""
    seen: dict[Any, list[Tensor]] = {}
    flips = [0]

    def before(gate: nn.Module, args: tuple[Any, ...]) -> Any:
        x, *others = args
        seen.setdefault(gate, []).append(x.detach())
        if len(seen[gate]) == 2 and dist.get_rank() == 0:
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
            return (x + 0.5 * x.detach().std() * noise, *others)
        return None

    def after(gate: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(seen[gate]) == 2 and gate.batch.recording is not None:
            recording, gate.batch.recording = gate.batch.recording, None
            with torch.no_grad():
                free = type(gate).forward(gate, *args)
            gate.batch.recording = recording
            flips[0] += int((free[-1 if len(free) > 2 else 0] != output[-1 if len(free) > 2 else 0]).sum())

    for gate in [m for m in model.modules() if isinstance(m, BalancedGate)]:
        gate.register_forward_pre_hook(before)
        gate.register_forward_hook(after)
    return flips


def one_family(family: str, reentrant: bool) -> dict[str, Any]:
    plain, model = family_model(family), family_model(family)
    set_family_biases(plain, 0), set_family_biases(model, 0)
    parallelize(model, ep_degree=2, timeout_seconds=30)
    flips, whole = flipped(checkpointed(model, reentrant)), batch(1)
    model(**part(whole, dist.get_rank(), 2)).loss.backward()
    load_LE = torch.stack([m.pending_load_E for m in model.modules() if isinstance(m, BalancedGate)])
    dist.all_reduce(load_LE)
    finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    return {"flips": flips[0], "load": torch.equal(load_LE, family_load(plain, whole)), "finite": finite}


def families_on_ranks() -> dict[tuple[str, str], dict[str, Any]]:
    return {(family, mode): one_family(family, MODES[mode]) for family in FAMILIES for mode in MODES}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Any]]]:
    return run_ranks(2, families_on_ranks, folder=tmp_path_factory.mktemp("ranks"), timeout_seconds=150)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_would_choose_otherwise_in_the_recompute_do_not(on_ranks: Any, family: str, mode: str) -> None:
    """Or a rank would wait for rows that never come: only the first rank's scores change."""
    first, second = (by_case[family, mode] for by_case in on_ranks)
    assert first["flips"] > 0 and second["flips"] == 0
    assert first["load"] and second["load"] and first["finite"] and second["finite"]
