"""What one rank cannot do, no rank does: a failure anywhere is the same error on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from alfb_dist.distributed.collectives import Group, broadcast_object, gather_objects, group_rank

T = TypeVar("T")


def describe_error(error: BaseException) -> str:
    """The error in words; with its type, unless it is of those whose message is meant for people."""
    return str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"


def agreed(action: Callable[[], T], group: Group, error: type[Exception]) -> T:
    """What the action returned here, after it has succeeded on every rank; collective.

    If it failed on any rank, `error` is raised on all of them with the same message, naming rank and cause; on the
    rank where it failed, the failure is its cause.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as e:
        failure = e
    words = None if failure is None else describe_error(failure)
    found = gather_objects(words, group)
    failed = [(rank, message) for rank, message in enumerate(found or []) if message is not None]
    verdict = ""
    if failed:
        same = [rank for rank, message in failed if message == failed[0][1]]
        ranks = "on all ranks" if len(same) == len(found or []) else f"rank {', '.join(map(str, same[:8]))}"
        verdict = f"{ranks}: {failed[0][1]}"
        if len(same) < len(failed):
            verdict += f" ({len(failed) - len(same)} more ranks failed otherwise)"
    verdict = broadcast_object(verdict, group)
    if verdict:
        raise error(verdict.removeprefix("on all ranks: ")) from failure
    return result


def first_ranks(make: Callable[[], T], group: Group, error: type[Exception]) -> T:
    """What `make` returned on the group's first rank, on every rank; collective.

    If it failed there, `error` is raised on every rank alike. The value is a plain object.
    """
    made = agreed(lambda: make() if group_rank(group) == 0 else None, group, error)
    value: T = broadcast_object(made, group)
    return value
