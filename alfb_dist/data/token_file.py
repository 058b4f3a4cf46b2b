"""Token files: documents as token ids in one file, with a hash over every byte.

    bytes 0 to 63   header: magic, version, offset and size of the index, the index's hash, the header's own hash
    bytes 64 on     payload: token ids (uint16 or uint32), zeros up to a multiple of 8, document ends (uint64)
    to the end      index: JSON with counts, dtype, tokenizer, and one xxh3-128 hash per block of the payload

Numbers are little-endian. A document's last token is the end-of-document token, so the token ids in file order are the
joined documents; a document's end is the number of tokens up to and including it. The index comes last, so that a file
of any size is written in one pass. Reading parses JSON and numbers; it never runs code.
"""

from __future__ import annotations

import json
import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

MAGIC = b"alfbtok\n"
VERSION = 1
HEADER_BYTES = 64
BLOCK_BYTES = 1 << 20
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
ENDS_DTYPE = np.dtype("<u8")
# magic, version, zero, index offset, index bytes, index hash; its own hash follows
_HEADER = struct.Struct("<8sIIQQ16s")


class TokenFileError(ValueError):
    """A token file is damaged, or a file is not a token file. The message names the path and the byte `offset`."""

    def __init__(self, path: Path, offset: int, problem: str) -> None:
        super().__init__(path, offset, problem)
        self.path = path
        self.offset = offset
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem} (at byte {self.offset})"


@dataclass(frozen=True)
class TokenIndex:
    """The index of a token file.

    vocab_size: every id is below it. tokenizer: its fingerprint. blocks: xxh3-128 of each block, in hex; block i is the
    block_bytes payload bytes from byte HEADER_BYTES + i * block_bytes on. notes: further numbers from the writer.
    """

    vocab_size: int
    end_id: int
    tokenizer: str
    dtype: str
    num_tokens: int
    num_documents: int
    block_bytes: int
    blocks: list[str]
    notes: dict[str, int | float] = field(default_factory=dict)

    @property
    def ends_offset(self) -> int:
        """Offset of the first document end."""
        return HEADER_BYTES + -(-self.num_tokens * DTYPES[self.dtype].itemsize // 8) * 8

    @property
    def payload_end(self) -> int:
        """Offset of the end of the payload."""
        return self.ends_offset + self.num_documents * ENDS_DTYPE.itemsize

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Parse an index. Raises ValueError, TypeError, KeyError or RecursionError if `raw` is not a valid one."""
        index = cls(**json.loads(raw))
        numbers = (index.num_tokens, index.num_documents, index.end_id, index.vocab_size, index.block_bytes)
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError("a number is not a non-negative integer")
        if index.end_id >= index.vocab_size or index.block_bytes == 0:
            raise ValueError("a number is out of range")
        if len(index.blocks) != -(-(index.payload_end - HEADER_BYTES) // index.block_bytes):
            raise ValueError("the number of block hashes does not fit the payload")
        return index


def pack_header(index_offset: int, index: bytes) -> bytes:
    """Return the header, HEADER_BYTES long, of a file with `index` at byte `index_offset`."""
    header = _HEADER.pack(MAGIC, VERSION, 0, index_offset, len(index), xxhash.xxh3_128_digest(index))
    return header + xxhash.xxh3_128_digest(header)


class TokenFile:
    """An open token file; tokens are read when they are asked for and not kept in memory.

    Opening checks the header, the index and the file's size. A block's hash is checked when a byte of it is first used.
    Reads use `pread` instead of a memory map, so that a file cut short under a running job raises an error instead of
    a bus error. Damage raises TokenFileError with path and byte offset; a missing file raises FileNotFoundError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        try:
            self.index, self.fingerprint = self._read_index()
        except BaseException:
            self.close()
            raise
        self._dtype = DTYPES[self.index.dtype]
        self._checked = np.zeros(len(self.index.blocks), dtype=bool)

    @property
    def num_tokens(self) -> int:
        """Number of token ids in the file, the end-of-document tokens included."""
        return self.index.num_tokens

    @property
    def num_documents(self) -> int:
        return self.index.num_documents

    @property
    def vocab_size(self) -> int:
        return self.index.vocab_size

    @property
    def end_id(self) -> int:
        """Id of the end-of-document token."""
        return self.index.end_id

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Read token ids start to stop (exclusive) of the joined documents, uint16 or uint32, read-only.

        Raises ValueError if the range is not within the file.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"{self.path}: tokens {start} to {stop} are not within its {self.num_tokens} tokens")
        size = self._dtype.itemsize
        return np.frombuffer(self._read_payload(HEADER_BYTES + start * size, (stop - start) * size), self._dtype)

    def document_span(self, document: int) -> tuple[int, int]:
        """Return first token and end (exclusive) of a document; its last token is the end-of-document token.

        Raises ValueError if there is no such document.
        """
        if not 0 <= document < self.num_documents:
            raise ValueError(f"{self.path}: document {document} is not among its {self.num_documents} documents")
        first = max(document - 1, 0)
        offset = self.index.ends_offset + first * ENDS_DTYPE.itemsize
        raw = self._read_payload(offset, (document + 1 - first) * ENDS_DTYPE.itemsize)
        ends = [0, *np.frombuffer(raw, ENDS_DTYPE).tolist()]
        start, stop = ends[-2], ends[-1]
        if not start < stop <= self.num_tokens:
            raise TokenFileError(self.path, offset, f"document {document} spans tokens {start} to {stop}")
        return start, stop

    def document(self, document: int) -> NDArray[Any]:
        """Read the token ids of one document, its end-of-document token included, uint16 or uint32, read-only."""
        return self.tokens(*self.document_span(document))

    def chunks(self, num_tokens: int = 1 << 20) -> Iterator[NDArray[Any]]:
        """Yield all token ids in file order, `num_tokens` at a time."""
        for start in range(0, self.num_tokens, num_tokens):
            yield self.tokens(start, min(start + num_tokens, self.num_tokens))

    def verify(self) -> None:
        """Read and hash every byte of the file. Raises TokenFileError for the first damaged part."""
        self._read_index()
        for block in range(len(self._checked)):
            self._check_block(block)

    def close(self) -> None:
        """Close the file; a second call does nothing. A file that nothing refers to is closed by itself."""
        self._finalizer()
        self._fd = -1  # the number may soon be another file's

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _read_index(self) -> tuple[TokenIndex, str]:
        """Return the index and its hash in hex, once header, index and file size are found to agree."""
        size = os.fstat(self._fd).st_size
        if size < HEADER_BYTES:
            raise TokenFileError(self.path, size, f"ends within its header of {HEADER_BYTES} bytes")
        raw = self._read(0, HEADER_BYTES)
        magic, version, _, offset, num_bytes, digest = _HEADER.unpack_from(raw)
        if magic != MAGIC:
            raise TokenFileError(self.path, 0, "is not a token file, or its first bytes are damaged")
        if version != VERSION:
            raise TokenFileError(
                self.path, 8, f"has version {version}, only {VERSION} can be read; or its header is damaged"
            )
        if xxhash.xxh3_128_digest(raw[: _HEADER.size]) != raw[_HEADER.size :]:
            raise TokenFileError(self.path, 0, f"its header of {HEADER_BYTES} bytes differs from its hash")
        if size != offset + num_bytes:
            problem = f"has {size} bytes and should have {offset + num_bytes}"
            raise TokenFileError(self.path, min(size, offset + num_bytes), problem)
        text = self._read(offset, num_bytes)
        if xxhash.xxh3_128_digest(text) != digest:
            raise TokenFileError(self.path, offset, f"its index of {num_bytes} bytes differs from its hash")
        try:
            index = TokenIndex.from_json(text)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise TokenFileError(self.path, offset, f"its index cannot be used: {error}") from error
        if index.payload_end != offset:
            raise TokenFileError(self.path, offset, f"its payload should end at byte {index.payload_end}")
        return index, digest.hex()

    def _read_payload(self, offset: int, num_bytes: int) -> bytes:
        first = (offset - HEADER_BYTES) // self.index.block_bytes
        stop = -(-(offset + num_bytes - HEADER_BYTES) // self.index.block_bytes)
        for block in range(first, stop):
            if not self._checked[block]:
                self._check_block(block)
        return self._read(offset, num_bytes)

    def _check_block(self, block: int) -> None:
        offset = HEADER_BYTES + block * self.index.block_bytes
        num_bytes = min(self.index.block_bytes, self.index.payload_end - offset)
        if xxhash.xxh3_128_hexdigest(self._read(offset, num_bytes)) != self.index.blocks[block]:
            raise TokenFileError(self.path, offset, f"its block of {num_bytes} bytes differs from its hash")
        self._checked[block] = True

    def _read(self, offset: int, num_bytes: int) -> bytes:
        data = os.pread(self._fd, num_bytes, offset)
        while len(data) < num_bytes:  # the system may return less than asked for; nothing at all is the end of the file
            more = os.pread(self._fd, num_bytes - len(data), offset + len(data))
            if not more:
                raise TokenFileError(self.path, offset + len(data), "has been cut short")
            data += more
        return data
