"""The loss of a model that knows how often each token occurs and nothing else."""

from __future__ import annotations

import numpy as np

from alfb_dist.data.token_file import TokenFile


def unigram_entropy(token_file: TokenFile) -> float:
    """Entropy of the file's token frequencies in nats per token; 0 for an empty file. Reads the whole file once."""
    counts = np.zeros(token_file.vocab_size, np.int64)
    for ids in token_file.chunks():
        counts += np.bincount(ids, minlength=token_file.vocab_size)
    if not counts.any():
        return 0.0
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
