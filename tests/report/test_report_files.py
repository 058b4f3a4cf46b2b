"""metrics.jsonl and loads.bin after a crash, a resume and on a full disk."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from support.report_runs import layer_names

from alfb_dist.report.append_file import AppendFile
from alfb_dist.report.load_file import LoadFile, read_loads
from alfb_dist.report.metrics_file import MetricsFile, read_metrics

L, E = 2, 3


def write_metrics(path: Path, steps: range) -> None:
    file = MetricsFile(path, last_step=10**9)
    for step in steps:
        file.append({"step": step, "loss": step / 2})
    file.close()


def write_loads(path: Path, steps: range) -> None:
    file = LoadFile(path, layer_names=layer_names(L), last_step=10**9)
    for step in steps:
        load_LE = np.arange(L * E, dtype=np.int64).reshape(L, E) + 2**40 * step
        file.append(step, load_LE, np.full((L, E), step / 8, dtype=np.float32))
    file.close()


def test_every_line_is_json_even_with_nan_and_infinity(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl", last_step=0)
    file.append({"step": 1, "loss": math.nan, "layers": [1.5, math.inf, {"deep": (-math.inf, 2)}]})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    line = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "layers": [1.5, None, {"deep": [None, 2]}]}
    file.close()


def test_a_record_is_readable_before_the_file_is_closed(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl", last_step=0)
    file.append({"step": 1, "loss": 2.0})
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": 2.0}]
    file.close()


def test_truncated_last_line_is_neither_read_nor_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_metrics(path, range(1, 4))
    whole = path.read_bytes()
    for cut in range(1, 20):
        path.write_bytes(whole[:-cut])
        assert [record["step"] for record in read_metrics(path)][:2] == [1, 2]
        write_metrics(path, range(7, 8))
        assert [record["step"] for record in read_metrics(path)] == [1, 2, 7]


def test_loads_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "loads.bin"
    write_loads(path, range(1, 5))
    loads = read_loads(path)
    assert loads is not None
    assert loads.layer_names == ("model.layers.1.mlp", "model.layers.2.mlp")
    assert loads.shape == (4, L, E)
    assert loads.steps.tolist() == [1, 2, 3, 4]
    assert loads.load_NLE[3, 1, 2] == 5 + 4 * 2**40
    assert loads.bias_NLE[2].tolist() == [[0.375] * 3] * 2


def test_load_file_follows_its_header(tmp_path: Path) -> None:
    path = tmp_path / "loads.bin"
    write_loads(path, range(1, 3))
    content = path.read_bytes()
    header = json.loads(content[: content.index(b"\n")])
    body = content[content.index(b"\n") + 1 :]
    record = np.dtype([(name, kind, tuple(shape)) for name, kind, shape in header["record"]])
    assert (header["layers"], header["experts"]) == (L, E)
    assert record.itemsize == 8 + L * E * (8 + 4)
    assert np.frombuffer(body, dtype=record)["step"].tolist() == [1, 2]


def test_truncated_load_record_is_neither_read_nor_kept(tmp_path: Path) -> None:
    path = tmp_path / "loads.bin"
    write_loads(path, range(1, 4))
    whole = path.read_bytes()
    for cut in (1, 8, 79):
        path.write_bytes(whole[:-cut])
        assert read_loads(path).steps.tolist() == [1, 2]  # type: ignore[union-attr]
        write_loads(path, range(9, 10))
        loads = read_loads(path)
        assert loads is not None
        assert loads.steps.tolist() == [1, 2, 9]
        assert loads.load_NLE[2, 0, 0] == 9 * 2**40


def test_truncated_load_header_starts_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "loads.bin"
    write_loads(path, range(1, 2))
    path.write_bytes(path.read_bytes()[:40])
    assert read_loads(path) is None
    write_loads(path, range(5, 6))
    assert read_loads(path).steps.tolist() == [5]  # type: ignore[union-attr]


def test_loads_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "loads.bin"
    write_loads(path, range(1, 2))
    file = LoadFile(path, layer_names=layer_names(L), last_step=1)
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 3\)"):
        file.append(2, np.zeros((L, 4), dtype=np.int64), np.zeros((L, 4), dtype=np.float32))
    file.close()
    (tmp_path / "other").write_bytes(b'{"format": "else"}\n')
    with pytest.raises(ValueError, match="other"):
        read_loads(tmp_path / "other")


def test_a_full_disk_leaves_only_whole_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = AppendFile(tmp_path / "f", size=0)
    file.append(b"first\n")
    write = os.write

    def half_then_full(handle: int, piece: memoryview) -> int:
        if len(piece) < 4:
            raise OSError(28, "No space left on device")
        return write(handle, piece[: len(piece) // 2 + 2])

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(OSError, match="No space"):
        file.append(b"second\n")
    monkeypatch.undo()
    assert (tmp_path / "f").read_bytes() == b"first\n"
    file.append(b"third\n")
    assert (tmp_path / "f").read_bytes() == b"first\nthird\n"
    file.close()
