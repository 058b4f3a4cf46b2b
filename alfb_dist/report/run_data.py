"""What a run folder tells: configuration, metrics, loads and summary, as arrays."""

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
    """One run as read from its folder; a running, crashed or empty run has less in it, never an error."""

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    training: Records
    evaluation: Records
    loads: Loads | None

    @property
    def name(self) -> str:
        """The run's name: the folder's."""
        return self.folder.resolve().name

    def column(self, key: str) -> NDArray[np.float64]:
        """One value per training record, NaN where it is missing."""
        return _column(self.training, key)

    def evaluation_column(self, key: str) -> NDArray[np.float64]:
        """One value per evaluation record, NaN where it is missing."""
        return _column(self.evaluation, key)

    def violation_NL(self) -> NDArray[np.float64]:
        """MaxVio of every training record and layer, NaN where it is missing; (N, 0) if no record names layers."""
        rows = [_numbers(record.get("max_violation_batch_per_layer")) for record in self.training]
        width = max((len(row) for row in rows), default=0)
        violation_NL = np.full((len(rows), width), np.nan)
        for index, row in enumerate(rows):
            violation_NL[index, : len(row)] = row
        return violation_NL

    def layer_labels(self) -> list[str]:
        """A short name per MoE layer: "layer 3" for "model.layers.3.mlp", the name itself where no number is in it."""
        if self.loads is not None:
            return [_short(name) for name in self.loads.layer_names]
        return [f"MoE layer {index}" for index in range(self.violation_NL().shape[1])]


def read_run(run_folder: Path) -> RunData:
    """The run in `run_folder`, as far as it has come. Raises FileNotFoundError if the folder holds no run."""
    folder = Path(run_folder)
    if not any((folder / name).exists() for name in (CONFIG, METRICS, LOADS)):
        raise FileNotFoundError(f"{folder} is not a run folder: it has none of {CONFIG}, {METRICS}, {LOADS}")
    records = read_metrics(folder / METRICS)
    return RunData(
        folder=folder,
        config=_read_object(folder / CONFIG),
        summary=_read_object(folder / SUMMARY),
        training=[record for record in records if "loss" in record],
        evaluation=[record for record in records if "val_loss" in record],
        loads=read_loads(folder / LOADS),
    )


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file; empty if it is missing or damaged, since a report is drawn from what is there."""
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
