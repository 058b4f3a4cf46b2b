"""A failure on any rank becomes the same error on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from alfb_dist.distributed.collectives import Group, broadcast_object, gather_objects, group_rank

T = TypeVar("T")
MAX_LISTED = 8


def describe_error(error: BaseException) -> str:
    """Return the error's message, after its type unless it is an OSError or ValueError, which are written for users."""
    return str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"


def on_every_rank(action: Callable[[], T], group: Group, error: type[Exception]) -> T:
    """Return this rank's result of the action, once it has succeeded on every rank; collective.

    If it failed on any rank, raises `error` on all of them with the same message, naming ranks and cause, chained to
    the failure on a rank that failed.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as e:
        failure = e
    messages = gather_objects(None if failure is None else describe_error(failure), group)
    verdict = broadcast_object(None if messages is None else _verdict(messages), group)
    if verdict is not None:
        raise error(verdict) from failure
    return result


def _verdict(messages: list[str | None]) -> str | None:
    """Return the first error of the ranks and where it occurred, None if there is none."""
    failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if not failed:
        return None
    first = failed[0][1]
    same = [rank for rank, message in failed if message == first]
    if len(same) == len(messages):
        return first
    ranks = ", ".join(map(str, same[:MAX_LISTED]))
    others = f" ({len(failed) - len(same)} more ranks failed otherwise)" if len(same) < len(failed) else ""
    return f"rank {ranks}: {first}{others}"


def first_ranks(make: Callable[[], T], group: Group, error: type[Exception]) -> T:
    """Return on every rank what `make` returned on the group's first rank, a plain object; collective.

    If it failed there, raises `error` on every rank.
    """
    made = on_every_rank(lambda: make() if group_rank(group) == 0 else None, group, error)
    value: T = broadcast_object(made, group)
    return value
