"""The files of a run directory: configuration, metrics, loads and summary, as arrays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alfb_dist.report.load_file import Loads, read_loads
from alfb_dist.report.metrics_file import read_metrics

CONFIG, METRICS, LOADS, SUMMARY = "config.json", "metrics.jsonl", "loads.bin", "summary.json"
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class RunData:
    """One run as read from its directory; what a running or crashed run has not written is empty."""

    directory: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    training: Records
    evaluation: Records
    loads: Loads | None

    @property
    def name(self) -> str:
        """The run's name, which is its directory's."""
        return self.directory.resolve().name

    def column(self, key: str) -> NDArray[np.float64]:
        """Return one value per training record, NaN where it is missing."""
        return _column(self.training, key)

    def evaluation_column(self, key: str) -> NDArray[np.float64]:
        """Return one value per evaluation record, NaN where it is missing."""
        return _column(self.evaluation, key)

    def violation_NL(self) -> NDArray[np.float64]:
        """Return MaxVio of every training record and layer, NaN where it is missing; (N, 0) if no record has layers."""
        rows = [_numbers(record.get("max_violation_batch_per_layer")) for record in self.training]
        width = max((len(row) for row in rows), default=0)
        violation_NL = np.full((len(rows), width), np.nan)
        for index, row in enumerate(rows):
            violation_NL[index, : len(row)] = row
        return violation_NL

    def layer_labels(self) -> list[str]:
        """Return a short name per MoE layer: "layer 3" for "model.layers.3.mlp", a name without a number unchanged."""
        if self.loads is not None:
            return [_short(name) for name in self.loads.layer_names]
        return [f"MoE layer {index}" for index in range(self.violation_NL().shape[1])]


def read_run(run_directory: Path) -> RunData:
    """Read a running or finished run from its directory. Raises FileNotFoundError if that holds no run."""
    directory = Path(run_directory)
    if not any((directory / name).exists() for name in (CONFIG, METRICS, LOADS)):
        raise FileNotFoundError(f"{directory} is not a run directory: it has none of {CONFIG}, {METRICS}, {LOADS}")
    records = read_metrics(directory / METRICS)
    return RunData(
        directory=directory,
        config=_read_object(directory / CONFIG),
        summary=_read_object(directory / SUMMARY),
        training=[record for record in records if "loss" in record],
        evaluation=[record for record in records if "val_loss" in record],
        loads=read_loads(directory / LOADS),
    )


def _read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in the file; empty if missing or damaged, since a report draws what there is."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _column(records: Records, key: str) -> NDArray[np.float64]:
    return np.array([_number(record.get(key)) for record in records], dtype=np.float64)


def _numbers(values: Any) -> list[float]:
    return [_number(value) for value in values] if isinstance(values, list) else []


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _short(name: str) -> str:
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"layer {numbers[-1]}" if numbers else name
