"""Writing token files: document by document, published as a whole."""

from __future__ import annotations

import sys
from array import array
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import ArrayLike

from alfb_dist.config.publish import publish
from alfb_dist.data.entropy import NOTE, entropy_of
from alfb_dist.data.token_file import BLOCK_BYTES, DTYPES, HEADER_BYTES, TokenIndex, pack_header

_COUNTED_VOCAB = 1 << 24  # no vocabulary of text is larger; the counts take 8 bytes an id


class TokenWriter:
    """Writes one token file in a `with` block; the file appears, on the disk, when the block ends without an error.

    vocab_size: ids are below it; it decides between uint16 and uint32. end_id: the end-of-document token, appended to
    each document. tokenizer: its fingerprint. block_bytes: payload bytes per hash. `notes` and the unigram entropy are
    put into the index when the block ends. Raises ValueError if a size is out of range.
    """

    def __init__(
        self, path: str | Path, *, vocab_size: int, end_id: int, tokenizer: str, block_bytes: int = BLOCK_BYTES
    ) -> None:
        if not 0 <= end_id < vocab_size <= 1 << 32:
            raise ValueError(
                f"end_id ({end_id}) must be in 0..vocab_size-1 and vocab_size ({vocab_size}) at most 2**32"
            )
        if block_bytes < 1:
            raise ValueError(f"block_bytes ({block_bytes}) must be at least 1")
        self.path = Path(path)
        self.notes: dict[str, int | float] = {}
        self._counts = np.zeros(vocab_size if vocab_size <= _COUNTED_VOCAB else 0, np.int64)
        self._settings: dict[str, Any] = {"vocab_size": vocab_size, "end_id": end_id, "tokenizer": tokenizer}
        self._vocab_size = vocab_size
        self._end_id = end_id
        self._dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._block_bytes = block_bytes
        self._blocks: list[str] = []
        self._block = xxhash.xxh3_128()
        self._room = block_bytes  # bytes until the block is full
        self._ends = array("Q")
        self._num_tokens = 0
        self._open = ExitStack()
        temporary = self._open.enter_context(publish(self.path, sync_to_disk=True))
        self._file = self._open.enter_context(open(temporary, "xb"))  # noqa: SIM115 - closed by __exit__
        self._file.write(bytes(HEADER_BYTES))

    @property
    def num_documents(self) -> int:
        return len(self._ends)

    def add(self, ids: ArrayLike) -> None:
        """Append a document: `ids` (N,), N >= 1, and the end-of-document token.

        Raises ValueError if the document is empty or an id is not in the vocabulary.
        """
        document = np.asarray(ids)
        if document.ndim != 1 or document.size == 0 or document.dtype.kind not in "ui":
            raise ValueError(f"a document must be a non-empty row of integers, not {document.dtype} {document.shape}")
        low, high = int(document.min()), int(document.max())
        if low < 0 or high >= self._vocab_size:
            raise ValueError(f"token ids {low} to {high} must be in 0..vocab_size-1, vocab_size is {self._vocab_size}")
        self._write(np.append(document, self._end_id).astype(DTYPES[self._dtype]).tobytes())
        if len(self._counts):
            self._counts += np.bincount(np.append(document, self._end_id), minlength=self._vocab_size)
        self._num_tokens += document.size + 1
        self._ends.append(self._num_tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            self._open.__exit__(kind, error, tb)
            return
        with self._open:
            self._finish()

    def _finish(self) -> None:
        self._write(bytes(-self._num_tokens * DTYPES[self._dtype].itemsize % 8))
        if sys.byteorder == "big":
            self._ends.byteswap()
        self._write(self._ends.tobytes())
        if self._room < self._block_bytes:
            self._blocks.append(self._block.hexdigest())
        index = TokenIndex(
            **self._settings,
            dtype=self._dtype,
            num_tokens=self._num_tokens,
            num_documents=len(self._ends),
            block_bytes=self._block_bytes,
            blocks=self._blocks,
            notes={**self.notes, NOTE: entropy_of(self._counts)} if len(self._counts) else self.notes,
        )
        text = index.to_json()
        self._file.write(text)
        self._file.seek(0)
        self._file.write(pack_header(index.payload_end, text))

    def _write(self, data: bytes) -> None:
        """Append `data` to the payload, and to the hashes of the blocks that it belongs to."""
        self._file.write(data)
        view = memoryview(data)
        while len(view):
            part, view = view[: self._room], view[self._room :]
            self._block.update(part)
            self._room -= len(part)
            if self._room == 0:
                self._blocks.append(self._block.hexdigest())
                self._block.reset()
                self._room = self._block_bytes
