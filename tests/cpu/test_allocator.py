"""The allocator uses memory again only when no tensor refers to it, and keeps hardly more than was once in use."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from alfb_dist.bench import memory
from alfb_dist.bench.contestants import Run
from alfb_dist.cpu import allocator
from alfb_dist.cpu.allocator import allocate

LIKE = torch.empty(0)
MANY = 1 << 20  # float32 numbers: 4 MiB


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start each test with no free block, and as if no memory had been in use."""
    gc.collect()
    allocator._free_blocks.clear()
    monkeypatch.setattr(allocator, "_usage", allocator._Usage())
    yield
    allocator._free_blocks.clear()


def free_bytes() -> int:
    return sum(len(block) for block in allocator._free_blocks)


def test_memory_is_used_again_once_its_tensor_is_gone() -> None:
    first = allocate((MANY,), LIKE)
    address = first.data_ptr()
    del first
    assert free_bytes() == 4 << 20
    assert allocate((1024, 1000), LIKE).data_ptr() == address  # a little smaller: the same block


@pytest.mark.parametrize(
    "holder", [lambda t: t[5:9], lambda t: t.view(2, -1), lambda t: t.detach(), lambda t: torch.nn.Parameter(t)]
)
def test_memory_is_not_used_again_while_anything_refers_to_it(holder: object) -> None:
    first = allocate((MANY,), LIKE).zero_()
    kept: Tensor = holder(first)  # type: ignore[operator]
    del first
    other = allocate((MANY,), LIKE).fill_(7)
    assert not kept.any() and other.data_ptr() != kept.untyped_storage().data_ptr()
    del kept
    assert free_bytes() == 4 << 20


def test_memory_of_a_gradient_is_free_once_the_gradient_is_none() -> None:
    weight = torch.nn.Parameter(torch.zeros(MANY))
    weight.grad = allocate((MANY,), LIKE).zero_()
    address = weight.grad.data_ptr()
    weight.grad = None
    assert allocate((MANY,), LIKE).data_ptr() == address


def test_repeated_steps_make_no_new_blocks_even_if_sizes_peak_at_different_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def step() -> None:
        held = [allocate((size * MANY,), LIKE) for size in (12, 2, 2, 2, 2)]
        del held[1:]
        held += [allocate((size * MANY,), LIKE) for size in (16, 8)]

    step(), step()
    monkeypatch.setattr(allocator.mmap, "mmap", None)  # a block that is made now fails
    step(), step()


def test_no_more_is_kept_than_was_in_use_at_one_time() -> None:
    for size in range(1, 40):
        allocate((size * MANY // 4,), LIKE)
        assert free_bytes() < (size + 2) << 20  # blocks are of whole huge pages
    assert len(allocator._free_blocks) == 1


def test_a_block_far_too_large_is_not_used() -> None:
    allocate((8 * MANY,), LIKE)
    assert free_bytes() == 32 << 20
    small = allocate((MANY,), LIKE)
    assert small.untyped_storage().nbytes() <= 4 << 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (1024, 1024)])
def test_shape_and_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    made = allocate(shape, LIKE.to(dtype))
    assert made.shape == shape and made.dtype == dtype and made.is_contiguous()
    assert made.data_ptr() % 64 == 0


def test_small_tensors_and_other_devices_are_left_to_torch() -> None:
    assert allocator.empty((1000,), LIKE) is None
    assert allocator.empty((MANY,), LIKE.to("meta")) is None
    assert allocator.empty((MANY,), LIKE) is not None


def test_the_benchmark_s_peak_counts_what_the_allocator_holds() -> None:
    held = allocate((1 << 20,), LIKE)  # 4 MiB, before the run

    def forward() -> Tensor:
        allocate((4 << 20,), LIKE)
        return allocate((1 << 20,), LIKE)

    for _ in range(2):  # with new blocks, and with kept ones
        assert memory.peak_bytes(Run(forward, lambda out: None)) == pytest.approx(16 << 20, rel=0.01)
    assert held.numel()
