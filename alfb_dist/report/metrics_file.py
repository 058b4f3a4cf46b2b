"""metrics.jsonl: one record per line, as a JSON object."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from alfb_dist.report.append_file import AppendFile


class MetricsFile:
    """The open metrics.jsonl of a run; others can read a record as soon as it is appended."""

    def __init__(self, path: Path, *, last_step: int) -> None:
        """Open `path` and keep its records up to `last_step`; later ones and a truncated last line are dropped."""
        self._file = AppendFile(path, size=_bytes_up_to(path, last_step))

    def append(self, record: dict[str, Any]) -> None:
        """Append a record; NaN and infinities become null. Raises OSError if it cannot be written."""
        self._file.append(json.dumps(finite(record), allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, oldest first, without damaged lines; none if there is no file."""
    if not path.exists():
        return []
    records = (_parse(line) for line in path.read_bytes().splitlines())
    return [record for record in records if record is not None]


def finite(value: Any) -> Any:
    """Replace every NaN and infinity by None, also inside lists, tuples and dicts."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _bytes_up_to(path: Path, last_step: int) -> int:
    """Return the size of the records that a run resumed after `last_step` keeps."""
    kept = 0
    if not path.exists():
        return kept
    with open(path, "rb") as file:
        for line in file:
            record = _parse(line)
            if not line.endswith(b"\n") or (record is not None and record["step"] > last_step):
                break
            kept += len(line)
    return kept


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
