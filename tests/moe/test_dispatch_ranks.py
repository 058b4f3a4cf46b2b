"""Dispatch and combine against a plain loop, on 1, 2 and 4 ranks: who gets which rows, how many, outputs, gradients."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch import Tensor

import alfb_dist
from alfb_dist.distributed.all_to_all import Exchange
from alfb_dist.moe.dispatch import Sent, combine, receive, send

Ranks = Callable[..., list[Any]]

EXPERTS, TOP_K, WIDTH = 8, 3, 5
RUNS = [("memory", 1), ("memory", 2), ("memory", 4), ("network", 2), ("network", 4), ("mixed", 4)]
"""Transports and numbers of ranks. One rank uses no transport, and two ranks on two machines have only the network."""
WITH_OTHERS = [run for run in RUNS if run[1] > 1]
CASES = ("even", "uneven", "idle first rank", "idle last rank", "all to the last", "none to the last", "no tokens")


def tokens_of(case: str, rank: int, world: int) -> int:
    """How many tokens a rank has."""
    if (
        case == "no tokens"
        or (case == "idle first rank" and rank == 0)
        or (case == "idle last rank" and rank + 1 == world)
    ):
        return 0
    return 6 if case == "even" else 3 + 2 * rank


def inputs_of(case: str, rank: int, world: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_TD, expert_ids_TK, weights_TK, gradient_TD) of a rank in float64; the ids of a token are distinct."""
    generator = torch.Generator().manual_seed(1000 * CASES.index(case) + rank)
    num_tokens, last = tokens_of(case, rank, world), EXPERTS // world * (world - 1)
    few = EXPERTS - last < TOP_K  # of the last rank's two experts a token then takes both, and one of the next rank's
    pool = {
        "all to the last": torch.arange(last - few, EXPERTS),
        "none to the last": torch.arange(last or EXPERTS),
    }.get(case, torch.arange(EXPERTS))
    picks = [pool[torch.randperm(len(pool), generator=generator)[:TOP_K]] for _ in range(num_tokens)]
    ids_TK = torch.stack(picks) if picks else torch.empty(0, TOP_K, dtype=torch.int64)
    x_TD, gradient_TD = torch.randn(2, num_tokens, WIDTH, generator=generator, dtype=torch.float64)
    return x_TD, ids_TK, torch.rand(num_tokens, TOP_K, generator=generator, dtype=torch.float64), gradient_TD


def expert_scales() -> Tensor:
    """Expert i makes tanh(scale_i * x) of x."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(EXPERTS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


def run_experts(rows: Tensor, ids: Tensor, weights: Tensor, scale_ED: Tensor) -> Tensor:
    """Slot by slot; an id past the last expert is an empty slot, which must have no weight."""
    assert not weights[ids == len(scale_ED)].any()
    padded_ED = torch.cat([scale_ED, torch.full((1, scale_ED.shape[1]), 1e9, dtype=scale_ED.dtype)])
    return sum(weights[:, k, None] * torch.tanh(rows * padded_ED[ids[:, k]]) for k in range(ids.shape[1]))


def dispatch(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_local: int, exchange: Exchange | None
) -> tuple[Tensor, Tensor, Tensor, Sent]:
    """Send and receive, with nothing in between."""
    sent = send(x_TD, ids_TK, weights_TK, num_local, exchange)
    return *receive(sent), sent


def run_case(case: str) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    num_local = EXPERTS // world
    x_TD, ids_TK, weights_TK, gradient_TD = inputs_of(case, rank, world)
    scale_ED = expert_scales()
    local_eD = scale_ED.detach()[rank * num_local : (rank + 1) * num_local].clone().requires_grad_()
    x_TD.requires_grad_(), weights_TK.requires_grad_()
    rows, ids, weights, sent = dispatch(x_TD, ids_TK, weights_TK, num_local, Exchange(dist.group.WORLD))
    out_TD = combine(run_experts(rows, ids, weights, local_eD), sent.route)
    out_TD.backward(gradient_TD)
    route = sent.route
    return {
        "slots": sent.slot_counts,
        "route": None if route is None else (route.num_tokens, route.token_N, route.send_counts, route.receive_counts),
        "rows": rows.detach(),
        "ids": ids,
        "weights": weights.detach(),
        "out": out_TD.detach(),
        "x grad": x_TD.grad,
        "weights grad": weights_TK.grad,
        "scale grad": local_eD.grad,
    }


def wire_bytes() -> dict[str, int]:
    """Bytes of the tensors that reach this rank from others, per case, forward and backward."""
    finish, arrived, counts = Exchange.finish, [0], {}

    def spy(*args: Any) -> Any:
        tensors, row_counts = finish(*args)
        arrived[0] += sum(t.nbytes for by_rank in tensors for t in by_rank)
        return tensors, row_counts

    Exchange.finish = spy
    for case in CASES:
        arrived[0] = 0
        run_case(case)
        counts[case] = arrived[0]
    Exchange.finish = finish
    return counts


def low_precision() -> tuple[Any, ...]:
    """A bfloat16 row with float32 weights: (types, whether every row and weight arrived to the bit)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x_TD, ids_TK, weights_TK, _ = inputs_of("even", rank, world)
    x_TD, weights_TK = x_TD.bfloat16().requires_grad_(), weights_TK.float().requires_grad_()
    rows, ids, weights, sent = dispatch(x_TD, ids_TK, weights_TK, EXPERTS // world, Exchange(dist.group.WORLD))
    theirs = torch.cat([inputs_of("even", r, world)[0] for r in range(world)]).bfloat16()
    bits = all((row == theirs).all(1).any() for row in rows)
    out_TD = combine(rows * weights.sum(1, keepdim=True).bfloat16(), sent.route)
    out_TD.sum().backward()
    return rows.dtype, ids.dtype, weights.dtype, out_TD.dtype, x_TD.grad.dtype, weights_TK.grad.dtype, bits


def all_cases(transport: str) -> tuple[dict[str, Any], dict[str, int], tuple[Any, ...]]:
    if transport == "network":
        os.environ["ALFB_SHARED_MEMORY"] = "0"
    elif transport == "mixed":  # the even ranks on one machine, the odd ones on another
        alfb_dist.cpu.network_namespace = lambda: dist.get_rank() % 2
    return {case: run_case(case) for case in CASES}, wire_bytes(), low_precision()


@pytest.fixture(scope="module")
def dispatched(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """dispatched(transport, world): by rank, the result of `all_cases`; run once each."""
    folder = tmp_path_factory.mktemp("ranks")
    return functools.cache(lambda transport, world: run_ranks(world, all_cases, transport, folder=folder))


@functools.cache
def oracle(case: str, world: int) -> list[dict[str, Tensor]]:
    """By rank, output and gradients of the same computation without any dispatch; scale grad is the sum over ranks."""
    scale_ED, results = expert_scales(), []
    for rank in range(world):
        x_TD, ids_TK, weights_TK, gradient_TD = inputs_of(case, rank, world)
        x_TD.requires_grad_(), weights_TK.requires_grad_()
        out_TD = torch.zeros_like(x_TD)
        for k in range(TOP_K):
            out_TD = out_TD + weights_TK[:, k, None] * torch.tanh(x_TD * scale_ED[ids_TK[:, k]])
        out_TD.backward(gradient_TD)
        results.append({"out": out_TD.detach(), "x grad": x_TD.grad, "weights grad": weights_TK.grad})
    for result in results:
        result["scale grad"] = scale_ED.grad
    return results


def expected_rows(case: str, world: int, rank: int) -> list[tuple[list[float], dict[int, float]]]:
    """What a rank gets, by sets: (x, weight by local expert) for each token with an expert here, by rank and token."""
    num_local, rows = EXPERTS // world, []
    for source in range(world):
        x_TD, ids_TK, weights_TK, _ = inputs_of(case, source, world)
        for x, ids, weights in zip(x_TD.tolist(), ids_TK.tolist(), weights_TK.tolist()):
            here = {i - rank * num_local: w for i, w in zip(ids, weights) if i // num_local == rank}
            if here:
                rows.append((x, here))
    return rows


def distinct_pairs(case: str, world: int, rank: int) -> set[tuple[int, int]]:
    ids_TK = inputs_of(case, rank, world)[1].tolist()
    return {(token, i // (EXPERTS // world)) for token, ids in enumerate(ids_TK) for i in ids}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("transport", "world"), WITH_OTHERS)
def test_a_token_crosses_once_to_each_rank_that_owns_its_experts(
    dispatched: Ranks, transport: str, world: int, case: str
) -> None:
    results = [result[0][case] for result in dispatched(transport, world)]
    for rank, result in enumerate(results):
        pairs = distinct_pairs(case, world, rank)
        num_tokens, token_N, send_counts, receive_counts = result["route"]
        assert num_tokens == tokens_of(case, rank, world)
        assert send_counts == [sum(r == destination for _, r in pairs) for destination in range(world)]
        assert receive_counts == [results[source]["route"][2][rank] for source in range(world)]
        destination_N = [d for d, n in enumerate(send_counts) for _ in range(n)]
        assert len(token_N) == len(pairs) and set(zip(token_N.tolist(), destination_N)) == pairs


@pytest.mark.parametrize(("transport", "world"), WITH_OTHERS)
def test_bytes_on_the_wire_are_the_distinct_pairs_there_and_back_twice(
    dispatched: Ranks, transport: str, world: int
) -> None:
    for case in CASES:
        for rank in range(world):
            pairs = [distinct_pairs(case, world, source) for source in range(world)]
            expected = 0
            for other in set(range(world)) - {rank}:
                to_here = sum(destination == rank for _, destination in pairs[other])
                to_there = sum(destination == other for _, destination in pairs[rank])
                row, slots = WIDTH * 8, TOP_K * 8
                # Forward: rows with weights and int32 ids to their experts, one row for each back.
                expected += to_here * (row + slots + TOP_K * 4) + to_there * row
                # Backward: the gradient of each such row, and back those of rows and weights.
                expected += to_here * row + to_there * (row + slots)
            assert dispatched(transport, world)[rank][1][case] == expected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("transport", "world"), RUNS)
def test_rows_arrive_with_local_ids_weights_and_empty_slots(
    dispatched: Ranks, transport: str, world: int, case: str
) -> None:
    num_local = EXPERTS // world
    for rank, (results, _, _) in enumerate(dispatched(transport, world)):
        rows, ids, weights = results[case]["rows"], results[case]["ids"], results[case]["weights"]
        expected = expected_rows(case, world, rank)
        assert rows.shape == (len(expected), WIDTH) and ids.shape == weights.shape == (len(expected), TOP_K)
        assert ids.dtype == torch.int64
        if world > 1:  # the numbers of filled slots that the ranks sent
            assert sum(results[case]["slots"]) == int((ids < num_local).sum())
        for row, row_ids, row_weights, (x, here) in zip(rows, ids.tolist(), weights.tolist(), expected):
            assert row.tolist() == x
            assert {i: w for i, w in zip(row_ids, row_weights) if i < num_local} == here
            empty = [(i, w) for i, w in zip(row_ids, row_weights) if i >= num_local]
            assert empty == [(num_local, 0.0)] * (TOP_K - len(here))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("transport", "world"), RUNS)
def test_output_and_gradients_equal_the_loop_without_dispatch(
    dispatched: Ranks, transport: str, world: int, case: str
) -> None:
    num_local = EXPERTS // world
    for rank, (results, _, _) in enumerate(dispatched(transport, world)):
        expected = oracle(case, world)[rank]
        for name in ("out", "x grad", "weights grad"):
            torch.testing.assert_close(results[case][name], expected[name], rtol=1e-13, atol=1e-14)
        local = slice(rank * num_local, (rank + 1) * num_local)
        total = torch.zeros(EXPERTS, WIDTH, dtype=torch.float64) if case == "no tokens" else expected["scale grad"]
        torch.testing.assert_close(results[case]["scale grad"], total[local], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("transport", "world"), WITH_OTHERS)
def test_rank_without_rows_has_zero_gradients_and_not_none(dispatched: Ranks, transport: str, world: int) -> None:
    result = dispatched(transport, world)[world - 1][0]["none to the last"]
    assert result["rows"].shape == (0, WIDTH)
    assert result["scale grad"].shape == (EXPERTS // world, WIDTH) and not result["scale grad"].any()
    assert result["out"].abs().min() > 0  # its own tokens are served elsewhere


@pytest.mark.parametrize(("transport", "world"), WITH_OTHERS)
def test_all_tokens_to_one_rank_all_arrive_there(dispatched: Ranks, transport: str, world: int) -> None:
    rows = [len(results["all to the last"]["rows"]) for results, _, _ in dispatched(transport, world)]
    assert rows[-1] == sum(tokens_of("all to the last", rank, world) for rank in range(world))
    assert not any(rows[: -1 - (world == 4)])  # of 4 ranks, the last owns too few experts for the third choice


@pytest.mark.parametrize(("transport", "world"), RUNS)
def test_bfloat16_rows_and_float32_weights_arrive_to_the_bit(dispatched: Ranks, transport: str, world: int) -> None:
    half, full = torch.bfloat16, torch.float32
    for _, _, seen in dispatched(transport, world):
        assert seen == (half, torch.int64, full, half, half, full, True)


def test_group_of_one_rank_has_no_route(dispatched: Ranks) -> None:
    assert all(case["route"] is None for case in dispatched("memory", 1)[0][0].values())


def test_without_a_group_tokens_stay_as_they_are() -> None:
    x_TD, ids_TK, weights_TK, _ = inputs_of("even", 0, 1)
    rows, ids, weights, sent = dispatch(x_TD, ids_TK, weights_TK, EXPERTS, None)
    assert rows is x_TD and ids is ids_TK and weights is weights_TK and sent.route is None
    assert combine(rows, sent.route) is rows
