"""Placement of a run's ranks: their hosts, expert-parallel groups and experts, and whether groups fit their hosts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from alfb_dist.config import ConfigError

ROWS = 16  # at most, of the table at the start of a run; with more ranks than that they share rows


def spanning_groups(hosts: Sequence[str], ep_degree: int) -> list[list[int]]:
    """Return the expert-parallel groups that span hosts although one of these hosts has room for the whole group.

    hosts: of each rank, in rank order. Such groups exchange rows over the network without need.
    """
    groups = [list(range(first, first + ep_degree)) for first in range(0, len(hosts), ep_degree)]
    room = {host: sum(other == host for other in hosts) for host in hosts}
    return [
        group
        for group in groups
        if len({hosts[rank] for rank in group}) > 1 and any(room[hosts[rank]] >= ep_degree for rank in group)
    ]


def check_placement(hosts: Sequence[str], ep_degree: int, rule: str) -> str:
    """Return a warning if expert-parallel groups span hosts without need, '' if none does or the rule is "any".

    rule: of `parallel.expert_placement`. Raises ConfigError instead of returning the warning if it is "node".
    """
    spanning = spanning_groups(hosts, ep_degree) if rule != "any" else []
    if not spanning:
        return ""
    first = spanning[0]
    where = ", ".join(f"{len(list(ranks))} on {host}" for host, ranks in groupby(hosts[rank] for rank in first))
    counts = sorted({sum(other == host for other in hosts) for host in hosts})
    warning = (
        f"{len(spanning)} of {len(hosts) // ep_degree} expert-parallel groups span hosts, such as ranks {_span(first)} "
        f"({where}), although parallel.ep_degree ({ep_degree}) fits on one: make the ranks of a host "
        f"({', '.join(map(str, counts))}) a multiple of ep_degree and number them host by host"
    )
    if rule == "node":
        raise ConfigError(f'parallel.expert_placement = "node": {warning}; or set it to "prefer-node"')
    return warning


def grid_rows(hosts: Sequence[str], ep_degree: int, num_experts: int) -> list[tuple[str, str, str, str]]:
    """Return rows (host, ranks, expert-parallel group, experts): one for each rank, or for a group's ranks on a host.

    A longer table is cut in the middle, with the number of rows left out.
    """
    each = num_experts // ep_degree
    rows = []
    for host, ranks in _row_ranks(hosts, ep_degree):
        first, last = ranks[0] % ep_degree, ranks[-1] % ep_degree
        experts = _span(range(first * each, (last + 1) * each)) + (f", {each} a rank" if len(ranks) > 1 else "")
        rows.append((host, _span(ranks), str(ranks[0] // ep_degree), experts))
    if len(rows) > ROWS:
        return [*rows[: ROWS - 2], ("...", f"{len(rows) - ROWS + 1} more rows", "", ""), rows[-1]]
    return rows


def _row_ranks(hosts: Sequence[str], ep_degree: int) -> Iterator[tuple[str, list[int]]]:
    if len(hosts) <= ROWS:
        yield from ((host, [rank]) for rank, host in enumerate(hosts))
        return
    for (host, _), ranks in groupby(range(len(hosts)), key=lambda rank: (hosts[rank], rank // ep_degree)):
        yield host, list(ranks)


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
