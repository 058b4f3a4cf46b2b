"""Batches: the contents of a micro-batch, and each sample once over all ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alfb_dist.data import Batches, TokenFile, TokenFileError, TokenWriter, batch_ids

END = 9
Opens = Callable[..., TokenFile]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opens]:
    files: list[TokenFile] = []

    def opened(documents: list[list[int]], block_bytes: int = 32) -> TokenFile:
        path = tmp_path / f"{len(files)}.tokens"
        with TokenWriter(path, vocab_size=10, end_id=END, tokenizer="t", block_bytes=block_bytes) as writer:
            for document in documents:
                writer.add(document)
        files.append(TokenFile(path))
        return files[-1]

    yield opened
    for file in files:
        file.close()


def some_documents(count: int = 37) -> list[list[int]]:
    chance = random.Random(0)
    return [[chance.randrange(9) for _ in range(chance.randint(1, 12))] for _ in range(count)]


def rows(batches: list[dict[str, torch.Tensor]], key: str = "input_ids") -> list[list[int]]:
    return [row for batch in batches for row in batch[key].tolist()]


def test_packed_samples_are_the_joined_documents_cut_up(opened: Opens) -> None:
    batches = Batches(opened([[1, 2, 3], [4], [5, 6, 7, 8], [0]]), 4, "packed")
    assert batches.num_samples == 3
    micro_batches = list(batches.evaluation(3, rank=0, world=1, micro_batch=3))
    assert rows(micro_batches) == [[1, 2, 3, 9], [4, 9, 5, 6], [7, 8, 9, 0]]
    assert rows(micro_batches, "labels") == rows(micro_batches)
    assert rows(micro_batches, "attention_mask") == [[1] * 4] * 3


def test_padded_samples_are_documents_with_padding_masked(opened: Opens) -> None:
    batches = Batches(opened([[1, 2, 3], [4], [5, 6, 7, 8]]), 4, "padded", pad_id=0)
    assert batches.num_samples == 3
    micro_batches = list(batches.evaluation(3, rank=0, world=1, micro_batch=3))
    assert rows(micro_batches) == [[1, 2, 3, 9], [4, 9, 0, 0], [5, 6, 7, 8]]
    assert rows(micro_batches, "labels") == [[1, 2, 3, 9], [4, 9, -100, -100], [5, 6, 7, 8]]
    assert rows(micro_batches, "attention_mask") == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_padding_with_the_end_token_masks_the_padding_and_not_the_end(opened: Opens) -> None:
    (batch,) = Batches(opened([[4]]), 4, "padded").evaluation(1, rank=0, world=1, micro_batch=1)
    assert batch["input_ids"].tolist() == [[4, 9, 9, 9]]
    assert batch["labels"].tolist() == [[4, 9, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("layout", "keys"), [("packed", {"input_ids", "labels"}), ("padded", {"input_ids", "labels", "attention_mask"})]
)
def test_a_micro_batch_is_int64_of_its_size(opened: Opens, layout: Any, keys: set[str]) -> None:
    for batch in Batches(opened(some_documents()), 5, layout).step(0, global_batch=12, rank=1, world=2, micro_batch=3):
        assert set(batch) == keys
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
        assert {tuple(tensor.shape) for tensor in batch.values()} == {(3, 5)}
        assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_a_step_is_the_same_for_any_world_and_micro_batch(
    opened: Opens, layout: Any, world: int, micro_batch: int
) -> None:
    batches = Batches(opened(some_documents()), 6, layout, pad_id=0, seed=5)
    every = rows(list(batches.evaluation(10**6, rank=0, world=1, micro_batch=1)))
    for step in (0, 1, 7, 1000):
        micro_batches = [b for rank in range(world) for b in batches.step(step, 24, rank, world, micro_batch)]
        assert len(micro_batches) == 24 // micro_batch
        assert rows(micro_batches) == [every[i] for i in batch_ids(5, step, 24, batches.num_samples).tolist()]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_evaluation_has_each_sample_once_in_equally_many_micro_batches(
    opened: Opens, world: int, micro_batch: int
) -> None:
    documents = some_documents()
    batches = Batches(opened(documents), 20, "padded", pad_id=0)
    for num_sequences in (1, 2, 7, 12, 37, 1000):
        by_rank = [list(batches.evaluation(num_sequences, rank, world, micro_batch)) for rank in range(world)]
        count = min(num_sequences, 37)
        assert {len(found) for found in by_rank} == {-(-count // (world * micro_batch))}
        assert {tuple(b["input_ids"].shape) for found in by_rank for b in found} == {(micro_batch, 20)}
        everything = [(ids, mask) for found in by_rank for ids, mask in zip(rows(found), rows(found, "attention_mask"))]
        texts = [ids[: sum(mask)] for ids, mask in everything if any(mask)]
        assert sorted(texts) == sorted([*d, END] for d in documents[:count])
        labels = [x for found in by_rank for row in rows(found, "labels") for x in row if x != -100]
        assert len(labels) == sum(len(d) + 1 for d in documents[:count])


def test_rows_that_fill_up_an_evaluation_are_fully_masked(opened: Opens) -> None:
    batches = Batches(opened([[1, 2, 3]] * 3), 4, "packed", pad_id=0)
    first, last = (list(batches.evaluation(3, rank, world=2, micro_batch=2)) for rank in (0, 1))
    assert rows(first) == [[1, 2, 3, 9], [1, 2, 3, 9]]
    assert rows(last) == [[1, 2, 3, 9], [0, 0, 0, 0]]
    assert rows(last, "labels") == [[1, 2, 3, 9], [-100] * 4]
    assert rows(last, "attention_mask") == [[1] * 4, [0] * 4]


def test_a_step_that_reads_damaged_tokens_names_file_and_byte(opened: Opens) -> None:
    file = opened([[i % 9] for i in range(200)])
    with file.path.open("r+b") as raw:
        raw.seek(64 + 3 * 32)
        raw.write(b"\xff")
    batches = Batches(file, 4, "packed")
    with pytest.raises(TokenFileError, match=f"{file.path}.*at byte {64 + 3 * 32}"):
        batches.step(0, batches.num_samples, 0, 1, 1)


def test_text_shorter_than_a_sample_is_refused_with_both_numbers(opened: Opens) -> None:
    file = opened([[1, 2], [3]])
    with pytest.raises(ValueError, match=r"5 tokens in 2 documents .* sequence_length \(6\): give more text"):
        Batches(file, 6, "packed")
    assert Batches(file, 5, "packed").num_samples == 1
    with pytest.raises(ValueError, match="0 documents"):
        Batches(opened([]), 6, "padded")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 1}, r"sequence_length \(1\) must be at least 2"),
        ({"layout": "stacked"}, r"layout \('stacked'\) must be one of packed, padded"),
        ({"pad_id": 10}, r"pad_id \(10\) must be in 0..vocab_size-1, vocab_size is 10"),
        ({"pad_id": -1}, r"pad_id \(-1\)"),
    ],
)
def test_arguments_out_of_range_are_refused(opened: Opens, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(opened([[1, 2], [3]]), **{"sequence_length": 2, "layout": "packed", **arguments})


@pytest.mark.parametrize(
    ("numbers", "message"), [((0, 0, 1, 1), "num_sequences"), ((4, 2, 2, 1), "rank"), ((4, 0, 1, 0), "micro_batch")]
)
def test_evaluation_refuses_numbers_out_of_range_before_the_first_batch(
    opened: Opens, numbers: tuple[int, int, int, int], message: str
) -> None:
    batches = Batches(opened([[1, 2], [3]]), 2, "packed")
    with pytest.raises(ValueError, match=message):
        batches.evaluation(*numbers)
