"""The key figures of a run: read once, shown in the final table and on the report's tiles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alfb_dist.report.run_data import RunData

_PEAK_SHARE = 0.25  # the early peak is sought in this first share of the run


def key_figures(run: RunData, given: dict[str, Any]) -> dict[str, Any]:
    """The figures that the records tell, those of the run's summary over them, and those `given` over both."""
    stated = {key: value for key, value in (run.summary | given).items() if value is not None}
    return _from_records(run) | _unigram(run.config) | stated


def _from_records(run: RunData) -> dict[str, Any]:
    violation = run.column("max_violation_batch")
    figures = {
        "first_loss": _first(run.column("loss")),
        "last_loss": _last(run.column("loss")),
        "val_loss": _last(run.evaluation_column("val_loss")),
        "val_perplexity": _last(run.evaluation_column("val_perplexity")),
        "max_violation_global": _last(run.evaluation_column("max_violation_global")),
        "max_violation_batch_peak": _early_peak(violation),
        "max_violation_batch_last": _last(violation),
        "tokens_per_second": _median(run.column("tokens_per_second")),
        "tokens": _last(run.column("tokens")),
        "steps": _last(run.column("step")),
    }
    return {key: value for key, value in figures.items() if value is not None}


def _unigram(config: dict[str, Any]) -> dict[str, Any]:
    """The unigram entropy if the configuration file records it at any depth."""
    for key, value in config.items():
        if key == "unigram_entropy" and isinstance(value, int | float):
            return {key: float(value)}
        if isinstance(value, dict) and (found := _unigram(value)):
            return found
    return {}


def _first(values: NDArray[np.float64]) -> float | None:
    return _pick(values, 0)


def _last(values: NDArray[np.float64]) -> float | None:
    return _pick(values, -1)


def _pick(values: NDArray[np.float64], index: int) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[index]) if len(known) else None


def _median(values: NDArray[np.float64]) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def _early_peak(values: NDArray[np.float64]) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[: max(1, math.ceil(len(known) * _PEAK_SHARE))].max()) if len(known) else None
