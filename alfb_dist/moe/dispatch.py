"""Tokens to the ranks that own their experts, and back.

A token is sent to a rank once, however many of its experts are there, with the ids and weights of those experts; the
rank returns one row, the weighted sum of its experts' outputs. So the bytes each way are the distinct (token, rank)
pairs times the bytes of a row, and the experts never know whether expert parallelism is on: they always get rows with K
slots, of which some are empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from alfb_dist import cpu
from alfb_dist.distributed.all_to_all import Exchange, Handle
from alfb_dist.moe.permute import plan_rows, sum_rows


@dataclass
class Route:
    """The record of one dispatch, by which rows return to their tokens."""

    exchange: Exchange
    num_tokens: int
    token_N: Tensor  # int64: which token of this rank each sent row is
    empty_NK: Tensor  # bool: which slots of a sent row are empty
    send_counts: list[int]  # rows for each rank of the group, this one included
    receive_counts: list[int]  # rows from each rank of the group, this one included; as they arrive

    @property
    def rank(self) -> int:
        """This rank's place in the group. Its own rows count as sent and received, but are not moved."""
        return self.exchange.rank


@dataclass
class Sent:
    """Tokens on their way to their experts, or that stay where they are if there is no route."""

    x_TD: Tensor
    weights: Tensor  # (N, K) of the sent rows, or (T, K)
    expert_ids: Tensor  # the same; int32 and local to the receiving rank, or as they are
    route: Route | None = None
    slot_counts: list[int] | None = None  # filled slots for each rank; once received, from each rank
    ticket: Tensor | None = None  # one number, through which the backward of `receive` reaches that of `send`
    handle: Handle | None = (
        None  # of the exchange that was started: in the forward the rows, in the backward their gradients
    )
    own_grads: tuple[Tensor, Tensor] | None = None  # in the backward, of the rows that stay on this rank


def _parts(counts: list[int]) -> list[slice]:
    return [slice(stop - n, stop) for n, stop in zip(counts, accumulate(counts))]


def send(
    x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, num_local_experts: int, exchange: Exchange | None
) -> Sent:
    """Start to send every token to its experts' ranks; collective, differentiable. `receive` must follow.

    What is computed in between overlaps the exchange, in the backward too.
    expert_ids_TK: int64 in [0, E]; E marks an empty slot. Expert i belongs to rank i // num_local_experts of the group.
    Without an exchange (or with one rank) the tokens stay as they are and there is no route.
    """
    if exchange is None or exchange.num_ranks == 1:
        return Sent(x_TD, weights_TK, expert_ids_TK)
    rows = plan_rows(expert_ids_TK, weights_TK.detach(), num_local_experts, exchange.num_ranks)
    route = Route(exchange, x_TD.shape[0], rows.token_N, rows.empty_NK, rows.row_counts, [])
    sent = Sent(x_TD.detach(), rows.weights_NK, rows.ids_NK, route, rows.slot_counts)
    sent.ticket = _Send.apply(x_TD, weights_TK, sent)
    return sent


def receive(sent: Sent) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens of this rank's experts: (rows_RD, expert_ids_RK, weights_RK); collective, differentiable.

    The ids are local, in [0, num_local_experts); an empty slot holds num_local_experts and weight 0.
    """
    if sent.route is None:
        return sent.x_TD, sent.expert_ids, sent.weights
    ticket, sent.ticket = sent.ticket, None  # its graph holds `sent`: a reference cycle
    rows_RD, weights_RK, ids_RK = _Receive.apply(ticket, sent)
    return rows_RD, ids_RK, weights_RK


def combine(rows_RD: Tensor, route: Route | None) -> Tensor:
    """Return each token's output, the sum of its ranks' rows: (T, D); collective, differentiable."""
    return rows_RD if route is None else _Combine.apply(rows_RD, route)


def _gather(x_TD: Tensor, arrived: list[Tensor], route: Route) -> Tensor:
    """Return the rows of all ranks in rank order, this rank's being those of its tokens: (R, D)."""
    shape = (sum(route.receive_counts), x_TD.shape[1])
    rows_RD = cpu.empty(shape, x_TD)
    if rows_RD is None:
        rows_RD = x_TD.new_empty(shape)
    for rank, (part, rows) in enumerate(zip(_parts(route.receive_counts), arrived)):
        if rank == route.rank:
            own_N = route.token_N[_parts(route.send_counts)[rank]]
            torch.index_select(x_TD, 0, own_N, out=rows_RD[part])
        else:
            rows_RD[part].copy_(rows)
    return rows_RD


def _join(small_N: Tensor, counts: list[int], arrived: list[Tensor], route: Route) -> Tensor:
    """Return what arrived from all ranks in rank order, this rank's part being that of small_N."""
    own = small_N[_parts(counts)[route.rank]]
    return torch.cat([own if rank == route.rank else part for rank, part in enumerate(arrived)])


def _sum_tokens(rows_RD: Tensor, arrived: list[Tensor], route: Route) -> Tensor:
    """Return the sum of each token's rows in rank order, of which rows_RD are this rank's: (T, D)."""
    own = rows_RD[_parts(route.receive_counts)[route.rank]]
    tokens = [route.token_N[part] for part in _parts(route.send_counts)]
    rows = [own if rank == route.rank else part for rank, part in enumerate(arrived)]
    return sum_rows(list(zip(tokens, rows)), route.num_tokens)


class _Send(torch.autograd.Function):
    """Sends tokens; the backward receives their gradients and sums them."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, sent: Sent) -> Tensor:
        assert sent.route is not None
        rows = [(x_TD, sent.route.token_N), (sent.weights, None), (sent.expert_ids, None)]
        sent.handle = sent.route.exchange.start(rows, sent.route.send_counts, numbers=sent.slot_counts)
        ctx.sent, ctx.top_k = sent, weights_TK.shape[1]
        return x_TD.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        sent, route = ctx.sent, ctx.sent.route
        arrived, _counts = route.exchange.finish(sent.handle)
        (grad_rows_RD, grad_weights_RK), sent.handle, sent.own_grads = sent.own_grads, None, None
        rows, weights = map(list, zip(*arrived))
        grad_weights_NK = _join(grad_weights_RK, route.receive_counts, weights, route).masked_fill_(route.empty_NK, 0)
        grad_weights_TK = grad_weights_NK.new_zeros(route.num_tokens, ctx.top_k)
        grad_weights_TK.index_add_(0, route.token_N, grad_weights_NK)
        return _sum_tokens(grad_rows_RD, rows, route), grad_weights_TK, None


class _Receive(torch.autograd.Function):
    """Receives tokens; the backward sends their gradients."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, sent: Sent) -> tuple[Tensor, Tensor, Tensor]:
        route = sent.route
        assert route is not None and sent.handle is not None
        arrived, route.receive_counts = route.exchange.finish(sent.handle)
        sent.slot_counts = sent.handle.numbers
        rows, weights, ids = map(list, zip(*arrived))
        rows_RD = _gather(sent.x_TD, rows, route)
        weights_RK = _join(sent.weights, route.send_counts, weights, route)
        ids_RK = _join(sent.expert_ids, route.send_counts, ids, route).to(torch.int64)
        sent.x_TD = sent.weights = sent.expert_ids = ids_RK.new_empty(0)  # they are not kept for the backward
        sent.handle = None
        ctx.sent, ctx.like = sent, ticket.new_zeros(1)
        ctx.mark_non_differentiable(ids_RK)
        return rows_RD, weights_RK, ids_RK

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        sent, (grad_rows_RD, grad_weights_RK, _) = ctx.sent, grads
        route, rows = sent.route, [(grad_rows_RD, None), (grad_weights_RK, None)]
        sent.handle = route.exchange.start(rows, route.receive_counts, route.send_counts)
        sent.own_grads = grad_rows_RD, grad_weights_RK
        return ctx.like, None


class _Combine(torch.autograd.Function):
    """Sends rows back and sums them; the backward sends gradients to the experts."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, route: Route) -> Tensor:
        ctx.route = route
        arrived, _ = route.exchange.all_to_all([(rows_RD, None)], route.receive_counts, route.send_counts)
        return _sum_tokens(rows_RD, [rows for (rows,) in arrived], route)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        route, (grad_TD,) = ctx.route, grads
        arrived, _ = route.exchange.all_to_all([(grad_TD, route.token_N)], route.send_counts, route.receive_counts)
        return _gather(grad_TD, [rows for (rows,) in arrived], route), None
