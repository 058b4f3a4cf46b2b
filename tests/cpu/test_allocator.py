"""Memory that is kept: used again only when nothing refers to it, and hardly more of it than was once in use."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from alfb_dist.cpu import allocator as arena

LIKE = torch.empty(0)
MANY = 1 << 20  # float32 numbers: 4 MiB


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with no free block, and as if nothing had been in use."""
    gc.collect()
    arena._free.clear()
    monkeypatch.setattr(arena, "_use", arena._Use())
    yield
    arena._free.clear()


def free_bytes() -> int:
    return sum(len(block) for block in arena._free)


def test_memory_comes_again_when_its_tensor_is_gone() -> None:
    first = arena.empty((MANY,), LIKE)
    address = first.data_ptr()
    del first
    assert free_bytes() == 4 << 20
    assert arena.empty((1024, 1000), LIKE).data_ptr() == address  # a little smaller: the same block


@pytest.mark.parametrize(
    "holder", [lambda t: t[5:9], lambda t: t.view(2, -1), lambda t: t.detach(), lambda t: torch.nn.Parameter(t)]
)
def test_memory_stays_as_long_as_anything_refers_to_it(holder: object) -> None:
    first = arena.zeros((MANY,), LIKE)
    kept: Tensor = holder(first)  # type: ignore[operator]
    del first
    other = arena.empty((MANY,), LIKE).fill_(7)
    assert not kept.any() and other.data_ptr() != kept.untyped_storage().data_ptr()
    del kept
    assert free_bytes() == 4 << 20


def test_gradients_may_live_here_and_leave_with_zero_grad() -> None:
    weight = torch.nn.Parameter(torch.zeros(MANY))
    weight.grad = arena.zeros((MANY,), LIKE)
    address = weight.grad.data_ptr()
    weight.grad = None
    assert arena.empty((MANY,), LIKE).data_ptr() == address


def test_no_block_is_made_once_each_was_there_though_sizes_have_their_peaks_at_different_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def step() -> None:
        held = [arena.empty((size * MANY,), LIKE) for size in (12, 2, 2, 2, 2)]
        del held[1:]
        held += [arena.empty((size * MANY,), LIKE) for size in (16, 8)]

    step(), step()
    monkeypatch.setattr(arena.mmap, "mmap", None)  # a block that is made now fails
    step(), step()


def test_no_more_is_kept_than_was_in_use_at_once() -> None:
    for size in range(1, 40):
        arena.empty((size * MANY // 4,), LIKE)
        assert free_bytes() < (size + 2) << 20  # blocks are of whole huge pages
    assert len(arena._free) == 1


def test_a_block_far_too_large_is_not_taken() -> None:
    arena.empty((8 * MANY,), LIKE)
    assert free_bytes() == 32 << 20
    small = arena.empty((MANY,), LIKE)
    assert small.untyped_storage().nbytes() <= 4 << 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (1024, 1024)])
def test_shape_dtype_and_zeros(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    arena.empty(shape, LIKE.to(dtype)).fill_(3)
    made = arena.zeros(shape, LIKE.to(dtype))
    assert made.shape == shape and made.dtype == dtype and made.is_contiguous() and not made.any()
    assert made.data_ptr() % 64 == 0
