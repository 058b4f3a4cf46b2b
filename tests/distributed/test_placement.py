"""Expert-parallel groups on hosts, and the table that shows them."""

from __future__ import annotations

import pytest

from alfb_dist.config import ConfigError
from alfb_dist.distributed.placement import ROWS, check_placement, grid_rows, spanning_groups


def on(**ranks: int) -> list[str]:
    """Return the host of each rank, host by host."""
    return [host for host, count in ranks.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("hosts", "ep_degree", "spanning"),
    [
        (on(a=4, b=4), 2, []),
        (on(a=4, b=4), 4, []),
        (on(a=4, b=4), 8, []),  # does not fit on a host: nothing to fix
        (on(a=2, b=2), 4, []),
        (on(a=6, b=6), 4, [[4, 5, 6, 7]]),
        (on(a=3, b=3), 2, [[2, 3]]),
        (["a", "b", "a", "b"], 2, [[0, 1], [2, 3]]),  # numbered in turn
        (on(a=4, b=2, c=2), 4, []),  # the second group fits on neither of its hosts
    ],
)
def test_groups_that_span_hosts_without_need(hosts: list[str], ep_degree: int, spanning: list[list[int]]) -> None:
    assert spanning_groups(hosts, ep_degree) == spanning


def test_a_spanning_group_is_reported_refused_or_ignored() -> None:
    hosts = on(node1=6, node2=6)
    warning = check_placement(hosts, 4, "prefer-node")
    assert "1 of 3 expert-parallel groups span hosts, such as ranks 4-7 (2 on node1, 2 on node2)" in warning
    with pytest.raises(ConfigError, match='expert_placement = "node"'):
        check_placement(hosts, 4, "node")
    assert check_placement(hosts, 4, "any") == ""
    assert check_placement(hosts, 6, "node") == ""
    assert check_placement([], 4, "node") == ""


def test_table_has_a_row_for_each_rank() -> None:
    assert grid_rows(on(a=2, b=2), 2, 8) == [
        ("a", "0", "0", "0-3"),
        ("a", "1", "0", "4-7"),
        ("b", "2", "1", "0-3"),
        ("b", "3", "1", "4-7"),
    ]
    assert grid_rows(on(a=2), 2, 2) == [("a", "0", "0", "0"), ("a", "1", "0", "1")]


def test_many_ranks_share_rows() -> None:
    assert grid_rows(on(a=16, b=16), 16, 64) == [
        ("a", "0-15", "0", "0-63, 4 a rank"),
        ("b", "16-31", "1", "0-63, 4 a rank"),
    ]
    assert grid_rows(on(a=16, b=16), 32, 64) == [
        ("a", "0-15", "0", "0-31, 2 a rank"),
        ("b", "16-31", "0", "32-63, 2 a rank"),
    ]


def test_long_table_is_cut_in_the_middle() -> None:
    rows = grid_rows([f"n{rank // 8}" for rank in range(8 * 40)], 8, 64)
    assert len(rows) == ROWS
    assert rows[-2:] == [("...", f"{40 - ROWS + 1} more rows", "", ""), ("n39", "312-319", "39", "0-63, 8 a rank")]
