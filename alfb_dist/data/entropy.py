"""The loss of a model that knows how often each token occurs and nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alfb_dist.data.token_file import TokenFile

NOTE = "unigram_entropy"


def unigram_entropy(token_file: TokenFile) -> float:
    """Entropy of the file's token frequencies in nats per token; 0 for an empty file.

    As its writer noted it; a file without the note is read once from end to end.
    """
    if NOTE in token_file.index.notes:
        return float(token_file.index.notes[NOTE])
    counts = np.zeros(token_file.vocab_size, np.int64)
    for ids in token_file.chunks():
        counts += np.bincount(ids, minlength=token_file.vocab_size)
    return entropy_of(counts)


def entropy_of(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of drawing from these counts, (V,); 0 if they are all 0."""
    if not counts.any():
        return 0.0
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
