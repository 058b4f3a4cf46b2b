"""What a rank writes is gathered from the ranks that hold it, and what no rank holds is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from alfb_dist.checkpoint.gathering import Gatherer, Request

CPU = torch.device("cpu")
VALUES = torch.arange(10, dtype=torch.int64)


def _gather(parameter: str) -> list[list[int]]:
    """Return what this rank gathers of "split", held in two parts, of "short", whose last element no rank holds, or of
    "twice", of which one element is held by both in unlike parts."""
    rank = dist.get_rank()
    held = {"split": [(0, 6), (6, 10)][rank], "short": [(0, 6), (6, 9)][rank], "twice": [(0, 7), (6, 10)][rank]}

    def read(request: Request, start: int, stop: int) -> torch.Tensor:
        low, high = held[request.parameter]
        assert low <= start < stop <= high
        return VALUES[start:stop]

    gatherer = Gatherer(held, read, 1, dist.group.WORLD, CPU)
    spans = [(0, 2, 5), (1, 4, 8), (0, 0, 10), (1, 6, 10)]
    requests = [Request(writer, parameter, "weight", None, start, stop, 8) for writer, start, stop in spans]
    return [x.view(torch.int64).tolist() for x in gatherer.gather(requests)]


def test_a_writer_receives_its_requests_in_order(tmp_path: Path) -> None:
    first, second = run_ranks(2, _gather, "split", folder=tmp_path)
    assert first == [[2, 3, 4], list(range(10))]
    assert second == [[4, 5, 6, 7], [6, 7, 8, 9]]


def test_parts_that_overlap_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="twice is held in parts that overlap: elements up to 7"):
        run_ranks(2, _gather, "twice", folder=tmp_path)


def test_an_element_that_no_rank_holds_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no rank holds element 9 of short"):
        run_ranks(2, _gather, "short", folder=tmp_path)
