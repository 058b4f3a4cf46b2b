"""Shared experts that run during the exchange: where they may, once each, with the same results."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny import tiny_batch, tiny_model
from support.tiny_families import family_model
from torch import Tensor, nn

from alfb_dist import parallelize
from alfb_dist.distributed.all_to_all import Exchange
from alfb_dist.moe.dispatch import Sent, _Receive, _Send
from alfb_dist.moe.families.blocks import moe_blocks
from alfb_dist.moe.parallelize import watch
from alfb_dist.moe.sharded_experts import sharded_experts
from alfb_dist.moe.shared_overlap import OverlappedSharedExperts, overlap_shared_experts

AFTERWARDS = {"deepseek_v3", "dots1", "glm4_moe", "exaone_moe"}
BEFORE = {"qwen2_moe", "hunyuan_v1_moe"}
WITHOUT = {"mixtral", "olmoe", "gpt_oss"}


@pytest.mark.parametrize("family", sorted(AFTERWARDS | BEFORE | WITHOUT))
def test_only_shared_experts_that_are_called_last_run_early(family: str) -> None:
    model = family_model(family)
    watch(model)
    found = [overlap_shared_experts(block.module, block.gate) for block in moe_blocks(model)]
    assert {shared and shared[1] for shared in found} == ({"shared_experts"} if family in AFTERWARDS else {None})


@pytest.mark.parametrize("options", [{"ep_degree": 1}, {"ep_degree": 1, "max_rows": 8}])
def test_none_run_early_where_no_rows_travel(options: dict[str, int]) -> None:
    model = parallelize(tiny_model(1), **options)
    assert [experts.shared for _, experts in sharded_experts(model)] == [None, None]


def early_block() -> tuple[nn.Module, OverlappedSharedExperts, Tensor]:
    """A block, its shared experts, which ran early on the tokens, and the tokens, (1, T, D)."""
    model = tiny_model(1)
    watch(model)
    first = next(moe_blocks(model))
    block, name = overlap_shared_experts(first.module, first.gate)
    shared, x = block.get_submodule(name), torch.randn(1, 5, 24, requires_grad=True) * 1
    shared.run_early(x.view(5, 24))
    return block, shared, x


def test_early_output_is_returned_once_in_the_shape_of_the_tokens() -> None:
    _, shared, x = early_block()
    early = shared.early[1]
    first, second = shared(x), shared(x)
    assert first.data_ptr() == early.data_ptr() != second.data_ptr()
    assert first.shape == x.shape and torch.equal(first, second)


@pytest.mark.parametrize("other", [lambda x: x * 2, lambda x: x.detach(), lambda x: x[:, :4], lambda x: x.clone()])
def test_other_tokens_are_computed_as_usual(other: Any) -> None:
    _, shared, x = early_block()
    early = shared.early[1]
    given = other(x)
    out = shared(given)
    assert out.data_ptr() != early.data_ptr() and shared.early is None
    assert torch.equal(out, shared(given)) and out.requires_grad


def test_tokens_that_were_changed_in_place_are_computed_again() -> None:
    _, shared, x = early_block()
    with torch.no_grad():
        x.mul_(2)
    assert torch.equal(shared(x), shared(x))


class Normed(nn.Module):
    """Shared experts after the experts, but with other tokens, or with another argument."""

    def __init__(self, block: Any, given: str) -> None:
        super().__init__()
        self.experts, self.shared_experts, self.given = block.experts, block.shared_experts, given

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.experts((hidden + 1).view(-1, 24), None, None).view_as(hidden)
        if self.given == "other tokens":
            return out + self.shared_experts(hidden + 1)
        return out + self.shared_experts(hidden, scale=1.0)


@pytest.mark.parametrize("given", ["other tokens", "more than tokens"])
def test_shared_experts_that_are_called_with_something_else_do_not_run_early(given: str) -> None:
    block, _, _ = early_block()
    block.register_module("normed", Normed(block, given))
    assert overlap_shared_experts(block.normed, block.gate) is None


def test_a_block_that_ends_early_keeps_no_output() -> None:
    block, shared, x = early_block()
    block.experts.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        block(x)
    assert shared.early is None


def order_of(model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
    """The calls of the first layer's parts in order, forward and backward."""
    order: list[str] = []
    _, experts = sharded_experts(model)[0]
    shared = experts.shared[0].get_submodule(experts.shared[1])
    linear = shared.down_proj

    def recorded(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            order.append(name)
            return function(*args)

        return call

    for kind, name in ((_Send, "send"), (_Receive, "receive")):
        kind.forward, kind.backward = recorded(name, kind.forward), recorded(f"{name} backward", kind.backward)
    linear.register_forward_hook(lambda *_: order.append("shared"))
    linear.register_full_backward_hook(lambda *_: order.append("shared backward"))
    model(**batch).loss.backward()
    return order


def run_order() -> list[str]:
    model = parallelize(tiny_model(3, num_hidden_layers=2, first_k_dense_replace=1), ep_degree=2)
    return order_of(model, tiny_batch(dist.get_rank(), 2, 5))


def fail_once() -> bool:
    """An error of the shared experts, caught by the caller, does not leave the ranks in the middle of an exchange."""
    model = parallelize(tiny_model(3), ep_degree=2).eval()
    batch = tiny_batch(dist.get_rank(), 2, 5)
    expected = model(**batch).logits
    block, name = sharded_experts(model)[0][1].shared
    failing = block.get_submodule(f"{name}.down_proj").register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    failing.remove()
    return torch.equal(model(**batch).logits, expected)


def infer() -> bool:
    """Inference mode, in which tensors have no version counter, equals no_grad."""
    model = parallelize(tiny_model(3), ep_degree=2).eval()
    batch = tiny_batch(dist.get_rank(), 2, 5)
    with torch.no_grad():
        expected = model(**batch).logits
    with torch.inference_mode():
        return torch.equal(model(**batch).logits, expected)


def dispatches_alive() -> tuple[int, int]:
    """Dispatches in memory after a forward without a backward, and after a whole step, both dropped."""
    model, batch = parallelize(tiny_model(3), ep_degree=2), tiny_batch(dist.get_rank(), 2, 5)
    gc.collect()
    gc.disable()
    counts = []
    for backward in (False, True):
        loss = model(**batch).loss
        if backward:
            loss.backward()
        del loss
        counts.append(sum(isinstance(x, Sent) for x in gc.get_objects()))
    gc.enable()
    return counts[0], counts[1]


def start_twice() -> str:
    exchange, rows = Exchange(dist.group.WORLD), torch.ones(2, 3)
    exchange.start([(rows, None)], [1, 1])
    with pytest.raises(RuntimeError) as error:
        exchange.start([(rows, None)], [1, 1])
    return str(error.value)


def on_two_ranks() -> dict[str, Any]:
    """Run all; the first counts objects of the whole process, the last two leave patches and a started exchange."""
    return {run.__name__: run() for run in (dispatches_alive, infer, fail_once, run_order, start_twice)}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, the result of each run by its name."""
    return run_ranks(2, on_two_ranks, folder=tmp_path_factory.mktemp("ranks"))


def test_they_run_between_sending_and_receiving_in_both_directions(seen: list[dict[str, Any]]) -> None:
    forward = ["send", "shared", "receive"]
    backward = ["receive backward", "shared backward", "send backward"]
    assert [rank["run_order"] for rank in seen] == [forward + backward] * 2


def test_an_error_between_sending_and_receiving_leaves_the_exchange_usable(seen: list[dict[str, Any]]) -> None:
    assert [rank["fail_once"] for rank in seen] == [True, True]


def test_inference_mode_works(seen: list[dict[str, Any]]) -> None:
    assert [rank["infer"] for rank in seen] == [True, True]


def test_nothing_of_a_dispatch_outlives_its_graph(seen: list[dict[str, Any]]) -> None:
    assert [rank["dispatches_alive"] for rank in seen] == [(0, 0), (0, 0)]


def test_a_second_start_is_refused(seen: list[dict[str, Any]]) -> None:
    refusals = [rank["start_twice"] for rank in seen]
    assert refusals == ["an exchange was started before the one before it was finished"] * 2
