"""The key figures of a run, for the final table and the report's tiles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alfb_dist.report.run_data import RunData

_PEAK_SHARE = 0.25  # the early peak is the largest value in this first share of the run


def key_figures(run: RunData, given: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the records, replaced by those of the run's summary, and these by those `given`."""
    recorded = {key: value for key, value in (run.summary | given).items() if value is not None}
    return _from_records(run) | _unigram(run.config) | recorded


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
    """Return the unigram entropy if the configuration has it at any depth."""
    for key, value in config.items():
        if key == "unigram_entropy" and isinstance(value, int | float):
            return {key: float(value)}
        if isinstance(value, dict) and (found := _unigram(value)):
            return found
    return {}


def _first(values: NDArray[np.float64]) -> float | None:
    return next(iter(_finite(values)), None)


def _last(values: NDArray[np.float64]) -> float | None:
    return next(reversed(_finite(values)), None)


def _median(values: NDArray[np.float64]) -> float | None:
    found = _finite(values)
    return float(np.median(found)) if found else None


def _early_peak(values: NDArray[np.float64]) -> float | None:
    found = _finite(values)
    return max(found[: math.ceil(len(found) * _PEAK_SHARE)], default=None)


def _finite(values: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in values[np.isfinite(values)]]
