"""The unigram entropy: the loss of a model that knows only how often each token occurs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alfb_dist.data.token_file import TokenFile

NOTE = "unigram_entropy"


def unigram_entropy(token_file: TokenFile) -> float:
    """Return the entropy of the file's token frequencies in nats per token; 0 for an empty file.

    Taken from the file's notes; a file without the note is read once.
    """
    if NOTE in token_file.index.notes:
        return float(token_file.index.notes[NOTE])
    counts = np.zeros(token_file.vocab_size, np.int64)
    for ids in token_file.chunks():
        counts += np.bincount(ids, minlength=token_file.vocab_size)
    return entropy_of(counts)


def entropy_of(counts: NDArray[np.int64]) -> float:
    """Return the entropy in nats of a distribution given by counts (V,); 0 if all are 0."""
    if not counts.any():
        return 0.0
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
