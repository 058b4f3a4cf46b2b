"""Where the ranks of a run stand: which hosts, which expert-parallel groups, which experts; and is that good?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from alfb_dist.config import ConfigError

ROWS = 16  # of the table at the start of a run; above that ranks share rows


def spanning_groups(hosts: Sequence[str], ep_degree: int) -> list[list[int]]:
    """The expert-parallel groups that span hosts although each would fit into one of theirs.

    hosts: of each rank, in rank order. Such groups exchange all their rows over the network for nothing.
    """
    groups = [list(range(first, first + ep_degree)) for first in range(0, len(hosts), ep_degree)]
    room = {host: sum(other == host for other in hosts) for host in hosts}
    return [
        group
        for group in groups
        if len({hosts[rank] for rank in group}) > 1 and any(room[hosts[rank]] >= ep_degree for rank in group)
    ]


def check_placement(hosts: Sequence[str], ep_degree: int, rule: str) -> str:
    """What a person should know of where the experts are, by `parallel.expert_placement`; empty if all is well.

    Raises ConfigError if a group spans hosts for nothing and the rule is "node".
    """
    spanning = spanning_groups(hosts, ep_degree) if rule != "any" else []
    if not spanning:
        return ""
    first = spanning[0]
    where = ", ".join(f"{len(list(ranks))} on {host}" for host, ranks in groupby(hosts[rank] for rank in first))
    counts = sorted({sum(other == host for other in hosts) for host in hosts})
    words = (
        f"{len(spanning)} of {len(hosts) // ep_degree} expert-parallel groups span hosts, such as ranks {_span(first)} "
        f"({where}), though parallel.ep_degree ({ep_degree}) fits into one: make the ranks of a host "
        f"({', '.join(map(str, counts))}) a multiple of ep_degree and number them host by host"
    )
    if rule == "node":
        raise ConfigError(f'parallel.expert_placement = "node": {words}; or take "prefer-node"')
    return words


def grid_rows(hosts: Sequence[str], ep_degree: int, num_experts: int) -> list[tuple[str, str, str, str]]:
    """(host, ranks, expert-parallel group, experts) for a table: a row a rank, or a row for a group's ranks on a host.

    Longer tables are cut, with how many rows are left out.
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
