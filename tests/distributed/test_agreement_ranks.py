"""A failure on any rank is the same error on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from alfb_dist.distributed.agreement import first_ranks, on_every_rank

# By case, the error of each rank, and what every rank then raises.
CASES: dict[str, tuple[list[Exception | None], str | None]] = {
    "none": ([None, None, None], None),
    "one": ([None, OSError("disk full"), None], "rank 1: disk full"),
    "all alike": ([ValueError("x")] * 3, "x"),
    "some alike": ([KeyError("x"), None, KeyError("x")], "rank 0, 2: KeyError: 'x'"),
    "different": ([None, ValueError("x"), ValueError("y")], "rank 1: x (1 more ranks failed otherwise)"),
    "without a message": ([ValueError()] * 3, ""),
}


def try_cases() -> dict[str, str | None]:
    """By case, the message that this rank gets; a failure of its own is the cause."""
    rank, group, found = dist.get_rank(), dist.group.WORLD, {}
    for name, (errors, _) in CASES.items():

        def action(error: Exception | None = errors[rank]) -> int:
            if error is not None:
                raise error
            return rank

        try:
            assert on_every_rank(action, group, RuntimeError) == rank
            found[name] = None
        except RuntimeError as error:
            found[name] = str(error) if error.__cause__ is errors[rank] else f"caused by {error.__cause__!r}"
    assert first_ranks(lambda: f"made by {rank}", group, RuntimeError) == "made by 0"
    return found


def test_every_rank_raises_the_first_error_with_the_ranks_that_have_it(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(3, try_cases) == [{name: message for name, (_, message) in CASES.items()}] * 3
