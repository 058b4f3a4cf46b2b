"""Micro-batches of token ids from a token file, ready for `model(**batch)`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alfb_dist.data.sampler import batch_ids, rank_samples
from alfb_dist.data.token_file import TokenFile

Layout = Literal["packed", "padded"]
IGNORED = -100  # the label that transformers' losses ignore
_NO_SAMPLE = -1


class Batches:
    """Samples of one length from a token file, in micro-batches.

    "packed": the joined documents cut into sequences; sample i is tokens i*L to i*L+L, a shorter rest is dropped.
    "padded": sample i is document i with its end-of-document token, cut to L or padded on the right with pad_id.
    L is sequence_length, at least 2; pad_id defaults to the file's end-of-document token. Labels are the input ids
    (transformers shifts them itself), -100 on padding. Samples are read when asked for, none is kept.
    Raises ValueError if an argument is out of range or the text does not fill one sample.
    """

    def __init__(
        self, token_file: TokenFile, sequence_length: int, layout: Layout, pad_id: int | None = None, seed: int = 0
    ) -> None:
        if layout not in get_args(Layout):
            raise ValueError(f"layout ({layout!r}) must be one of {', '.join(get_args(Layout))}")
        if sequence_length < 2:
            raise ValueError(
                f"sequence_length ({sequence_length}) must be at least 2: one token to read, one to predict"
            )
        self.token_file = token_file
        self.sequence_length = sequence_length
        self.layout: Layout = layout
        self.pad_id = token_file.end_id if pad_id is None else pad_id
        self.seed = seed
        if not 0 <= self.pad_id < token_file.vocab_size:
            raise ValueError(
                f"pad_id ({self.pad_id}) must be in 0..vocab_size-1, vocab_size is {token_file.vocab_size}"
            )
        if self.num_samples < 1:
            raise ValueError(
                f"{token_file.path}: {token_file.num_tokens} tokens in {token_file.num_documents} documents do not "
                f"fill one {layout} sample of sequence_length ({sequence_length}): "
                "give more text or a shorter sequence_length"
            )

    @property
    def num_samples(self) -> int:
        """Number of samples in an epoch."""
        if self.layout == "padded":
            return self.token_file.num_documents
        return self.token_file.num_tokens // self.sequence_length

    def step(self, step: int, global_batch: int, rank: int, world: int, micro_batch: int) -> list[dict[str, Tensor]]:
        """Return the rank's micro-batches of a training step, global_batch / world / micro_batch of them.

        Each is {"input_ids", "labels"}, int64 (micro_batch, sequence_length); in the padded layout also an
        "attention_mask" of this shape, 0 on padding. All ranks together have the samples of the step's global batch
        once each, for any world and micro_batch. Raises ValueError if world * micro_batch does not divide global_batch.
        """
        ids = batch_ids(self.seed, step, global_batch, self.num_samples)
        masked = self.layout == "padded"
        return [self._micro_batch(part.tolist(), masked) for part in rank_samples(ids, rank, world, micro_batch)]

    def evaluation(self, num_sequences: int, rank: int, world: int, micro_batch: int) -> Iterator[dict[str, Tensor]]:
        """Yield the rank's micro-batches of the first num_sequences samples (all, if there are fewer), in file order.

        Every rank yields the same number of them, with an "attention_mask". The last ones are filled up with rows of
        padding (mask 0, labels -100), so that each sample counts exactly once. The mean loss of a micro-batch without
        labels is NaN: sum losses and label counts instead. Raises ValueError at the call if a number is out of range.
        """
        if num_sequences < 1:
            raise ValueError(f"num_sequences ({num_sequences}) must be at least 1")
        count = min(num_sequences, self.num_samples)
        slots = max(world * micro_batch, 1)
        samples = np.full(-(-count // slots) * slots, _NO_SAMPLE, np.int64)
        samples[:count] = np.arange(count)
        rounds = np.split(samples, len(samples) // slots)
        parts = [rank_samples(ids, rank, world, micro_batch)[0] for ids in rounds]
        return (self._micro_batch(part.tolist(), masked=True) for part in parts)

    def _micro_batch(self, samples: Sequence[int], masked: bool) -> dict[str, Tensor]:
        input_ids = np.full((len(samples), self.sequence_length), self.pad_id, np.int64)
        mask = np.zeros_like(input_ids)
        for i, sample in enumerate(samples):
            tokens = self._sample(sample)
            input_ids[i, : len(tokens)] = tokens
            mask[i, : len(tokens)] = 1
        batch = {"input_ids": torch.from_numpy(input_ids)}
        batch["labels"] = torch.from_numpy(np.where(mask == 1, input_ids, IGNORED))
        if masked:
            batch["attention_mask"] = torch.from_numpy(mask)
        return batch

    def _sample(self, sample: int) -> NDArray[Any]:
        """Read the sample's token ids, at most sequence_length; none for _NO_SAMPLE."""
        if sample == _NO_SAMPLE:
            return np.empty(0, np.int64)
        if self.layout == "packed":
            start = sample * self.sequence_length
            return self.token_file.tokens(start, start + self.sequence_length)
        start, stop = self.token_file.document_span(sample)
        return self.token_file.tokens(start, min(stop, start + self.sequence_length))
