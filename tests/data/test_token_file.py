"""Token files: tokens are read as they were written, and all damage is noticed."""

from __future__ import annotations

import math
import os
import pickle
import random
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from alfb_dist.data import TokenFile, TokenFileError, TokenWriter, token_writer, unigram_entropy
from alfb_dist.data.token_file import HEADER_BYTES, pack_header

BLOCK = 64
END = 256
Writes = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Writes:
    def write(
        documents: list[list[int]], *, vocab_size: int = 257, end_id: int = END, block_bytes: int = BLOCK
    ) -> Path:
        path = tmp_path / "some.tokens"
        with TokenWriter(
            path, vocab_size=vocab_size, end_id=end_id, tokenizer="bytes-1", block_bytes=block_bytes
        ) as writer:
            for document in documents:
                writer.add(document)
        return path

    return write


def some_documents(seed: int = 0, count: int = 20, vocab_size: int = 256) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(vocab_size) for _ in range(chance.randint(1, 60))] for _ in range(count)]


def use_all(path: Path) -> None:
    """Open the file and use each of its documents, as training does."""
    with TokenFile(path) as file:
        for i in range(file.num_documents):
            file.document(i)


def test_documents_and_joined_tokens_are_read_as_written(write: Writes) -> None:
    documents = some_documents()
    with TokenFile(write(documents)) as file:
        assert [file.document(i).tolist() for i in range(file.num_documents)] == [[*d, END] for d in documents]
        joined = [token for d in documents for token in [*d, END]]
        assert file.num_tokens == len(joined)
        assert file.tokens(0, len(joined)).tolist() == joined
        assert np.concatenate(list(file.chunks(7))).tolist() == joined
        chance = random.Random(1)
        for _ in range(200):
            start, stop = sorted(chance.choices(range(len(joined) + 1), k=2))
            assert file.tokens(start, stop).tolist() == joined[start:stop]


def test_bytes_of_a_small_file_follow_the_format(write: Writes) -> None:
    raw = write([[1, 2], [3]], vocab_size=10, end_id=9).read_bytes()
    assert raw[:12] == b"alfbtok\n" + struct.pack("<I", 1)
    payload = struct.pack("<5H", 1, 2, 9, 3, 9) + bytes(6) + struct.pack("<2Q", 3, 5)
    assert raw[64:96] == payload
    index = (
        '{"block_bytes":64,"blocks":["'
        + xxhash.xxh3_128_hexdigest(payload)
        + '"],"dtype":"uint16","end_id":9,"notes":{"unigram_entropy":1.3321790402101223},'
        '"num_documents":2,"num_tokens":5,"tokenizer":"bytes-1","vocab_size":10}'
    )
    assert raw[96:] == index.encode()
    assert raw[16:32] == struct.pack("<2Q", 96, len(index))
    assert raw[32:48] == xxhash.xxh3_128_digest(index.encode())
    assert raw[48:64] == xxhash.xxh3_128_digest(raw[:48])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32"), (1 << 32, "uint32")])
def test_dtype_is_the_smallest_that_holds_the_vocabulary(write: Writes, vocab_size: int, dtype: str) -> None:
    with TokenFile(write([[vocab_size - 1, 0, 1]], vocab_size=vocab_size, end_id=2)) as file:
        assert file.document(0).dtype == dtype
        assert file.document(0).tolist() == [vocab_size - 1, 0, 1, 2]


@pytest.mark.parametrize("document", [[], [257], [-1], [1.5], [[1]], np.array([1 << 63], np.uint64)])
def test_a_document_that_is_not_a_row_of_known_ids_is_refused(write: Writes, document: list[int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        write([document])


@pytest.mark.parametrize("document", [-1, 3])
def test_a_document_beyond_the_file_is_refused(write: Writes, document: int) -> None:
    with TokenFile(write([[1], [2], [3]])) as file, pytest.raises(ValueError, match=f"document {document} .* 3 doc"):
        file.document(document)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 7), (3, 2)])
def test_a_range_beyond_the_file_is_refused(write: Writes, start: int, stop: int) -> None:
    with TokenFile(write([[1], [2], [3]])) as file, pytest.raises(ValueError, match="within its 6 tokens"):
        file.tokens(start, stop)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(write: Writes) -> None:
    path = write([[1, 2]])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="vocab_size is 257"):
        write([[5], [999]])
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_fingerprint_is_equal_for_equal_content_only(write: Writes) -> None:
    prints = [TokenFile(write(d)).fingerprint for d in ([[1, 2], [3]], [[1, 2], [3]], [[1], [2, 3]])]
    assert prints[0] == prints[1] != prints[2]


def test_every_flipped_bit_is_found_and_named(write: Writes) -> None:
    path = write(some_documents())
    raw = path.read_bytes()
    payload_end = TokenFile(path).index.payload_end
    regions = [range(HEADER_BYTES), range(HEADER_BYTES, payload_end), range(payload_end, len(raw))]
    assert len(regions[1]) > 10 * BLOCK
    for seed in range(200):
        chance = random.Random(seed)
        place, bit = chance.choice(regions[seed % 3]), chance.randrange(8)
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :])
        with pytest.raises(TokenFileError) as caught:
            use_all(path)
        assert str(path) in str(caught.value)
        assert f"byte {caught.value.offset}" in str(caught.value)
        block = place - (place - HEADER_BYTES) % BLOCK
        assert caught.value.offset in [(0, 8), (block,), (payload_end,)][seed % 3], (seed, place)
    path.write_bytes(raw)
    use_all(path)


def test_every_truncation_is_found_and_named(write: Writes) -> None:
    path = write(some_documents())
    raw = path.read_bytes()
    for length in random.Random(0).sample(range(len(raw)), 200):
        path.write_bytes(raw[:length])
        with pytest.raises(TokenFileError) as caught:
            TokenFile(path)
        assert caught.value.offset == length
        assert f"byte {length}" in str(caught.value)
        assert str(path) in str(caught.value)


def test_bytes_beyond_the_end_are_found(write: Writes) -> None:
    path = write(some_documents())
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(TokenFileError, match=f"has {size + 1} bytes and should have {size} "):
        TokenFile(path)


def test_a_file_cut_short_while_open_is_an_error_and_not_a_crash(write: Writes) -> None:
    path = write(some_documents())
    with TokenFile(path) as file:
        file.tokens(0, 1)
        os.truncate(path, 80)
        with pytest.raises(TokenFileError, match=r"cut short \(at byte 80\)"):
            file.tokens(0, 32)
        with pytest.raises(TokenFileError, match="bytes and should have"):
            file.verify()


def test_damage_is_named_when_its_block_is_used_and_not_before(write: Writes) -> None:
    path = write(some_documents())
    raw = bytearray(path.read_bytes())
    raw[HEADER_BYTES + 5 * BLOCK + 3] ^= 1
    path.write_bytes(raw)
    with TokenFile(path) as file:
        per_block = BLOCK // 2
        file.tokens(0, 5 * per_block)
        with pytest.raises(TokenFileError, match=f"at byte {HEADER_BYTES + 5 * BLOCK}"):
            file.tokens(5 * per_block - 1, 5 * per_block + 1)
        with pytest.raises(TokenFileError, match=f"at byte {HEADER_BYTES + 5 * BLOCK}"):
            file.tokens(6 * per_block - 1, 6 * per_block)
        file.tokens(6 * per_block, 6 * per_block + 1)


def test_verify_hashes_again_what_was_already_used(write: Writes) -> None:
    path = write(some_documents())
    with TokenFile(path) as file:
        file.verify()
        with path.open("r+b") as other:
            other.seek(HEADER_BYTES)
            other.write(b"\xff\xff")
        with pytest.raises(TokenFileError, match=f"at byte {HEADER_BYTES}"):
            file.verify()


def test_an_index_that_contradicts_the_file_is_refused_although_its_hash_is_right(write: Writes) -> None:
    path = write([[1, 2], [3]])
    raw, good = path.read_bytes(), TokenFile(path).index
    changes = [
        ("num_tokens", 500),
        ("num_tokens", -1),
        ("num_documents", "2"),
        ("num_documents", 1),
        ("dtype", "object"),
        ("block_bytes", 0),
    ]
    texts = [good.to_json().replace(b"{", b"[", 1), b"[" * 100_000, b"{}", b"\xff"]
    texts += [type(good)(**{**good.__dict__, key: value}).to_json() for key, value in changes]
    for text in texts:
        path.write_bytes(pack_header(good.payload_end, text) + raw[HEADER_BYTES : good.payload_end] + text)
        with pytest.raises(TokenFileError, match=f"at byte {good.payload_end}"):
            TokenFile(path)


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def test_opening_a_pickle_runs_no_code(tmp_path: Path) -> None:
    bomb = pickle.dumps(_Bomb(tmp_path / "ran"))
    for raw in (bomb, bomb * 10, pack_header(HEADER_BYTES, bomb) + bomb):
        (tmp_path / "x.tokens").write_bytes(raw)
        with pytest.raises(TokenFileError):
            TokenFile(tmp_path / "x.tokens")
    assert not (tmp_path / "ran").exists()


def test_the_error_can_be_sent_between_processes(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(TokenFileError(tmp_path, 5, "is odd")))
    assert (str(error), error.path, error.offset) == (f"{tmp_path}: is odd (at byte 5)", tmp_path, 5)


def test_a_closed_file_cannot_be_read(write: Writes) -> None:
    file = TokenFile(write([[1]]))
    file.tokens(0, 1)
    file.close()
    file.close()
    with TokenFile(file.path), pytest.raises(OSError, match="Bad file descriptor"):  # which may get the same descriptor
        file.tokens(0, 1)


@pytest.mark.parametrize("noted", [True, False])
def test_unigram_entropy_of_a_half_and_two_quarters(
    write: Writes, monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    if not noted:
        monkeypatch.setattr(token_writer, "_COUNTED_VOCAB", 0)
    with TokenFile(write([[0, 0, 1]], vocab_size=3, end_id=2)) as file:
        assert ("unigram_entropy" in file.index.notes) == noted
        assert unigram_entropy(file) == pytest.approx(1.5 * math.log(2), rel=1e-15)


def test_unigram_entropy_equals_a_sum_over_counted_tokens(write: Writes) -> None:
    documents = some_documents(vocab_size=50)
    counts = Counter(token for d in documents for token in [*d, END])
    total = sum(counts.values())
    with TokenFile(write(documents)) as file:
        assert unigram_entropy(file) == pytest.approx(sum(n / total * math.log(total / n) for n in counts.values()))
