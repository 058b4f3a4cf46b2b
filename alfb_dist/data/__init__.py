"""Text to micro-batches: token files, preparation, and a sampler that needs no state."""

from alfb_dist.data.batches import IGNORED, Batches, Layout
from alfb_dist.data.entropy import unigram_entropy
from alfb_dist.data.preparation import PreparedData, prepare
from alfb_dist.data.sampler import batch_ids, rank_samples
from alfb_dist.data.sources import PYTHON_STDLIB
from alfb_dist.data.token_file import TokenFile, TokenFileError
from alfb_dist.data.token_writer import TokenWriter
from alfb_dist.data.tokenizer import BYTES

__all__ = [
    "BYTES",
    "IGNORED",
    "PYTHON_STDLIB",
    "Batches",
    "Layout",
    "PreparedData",
    "TokenFile",
    "TokenFileError",
    "TokenWriter",
    "batch_ids",
    "prepare",
    "rank_samples",
    "unigram_entropy",
]
