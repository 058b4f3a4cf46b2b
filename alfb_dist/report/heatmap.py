"""Loads as colours: one shade per expert, and pictures of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alfb_dist.report.png import data_uri, png
from alfb_dist.report.svg import slices

CAP = 4.0  # full colour at 1/CAP and CAP times the mean load
COLD, HOT = (37, 99, 201), (208, 59, 48)  # below and above the mean; strength is opacity, so any background works
_LEVELS = 32  # shades on each side of the mean; more would only grow the file
_NEUTRAL = _LEVELS
_MISSING = 2 * _LEVELS + 1

Shade = NDArray[np.float64]  # -1 full cold, 0 the mean, 1 full hot, NaN unknown


def load_ratio(load_E: NDArray[np.generic]) -> NDArray[np.float64]:
    """Divide each load by the mean of its layer (last axis); NaN where the whole layer has none."""
    load = np.asarray(load_E, dtype=np.float64)
    mean = load.mean(axis=-1, keepdims=True)
    return np.divide(load, mean, out=np.full_like(load, np.nan), where=mean > 0)


def shade(ratio: NDArray[np.float64]) -> Shade:
    """Return ratios to the mean on a logarithmic scale from -1 at 1/CAP or less to 1 at CAP or more."""
    ends = np.clip(ratio, 1 / CAP, CAP)
    return np.asarray(np.log2(ends) / np.log2(CAP), dtype=np.float64)


def picture(shade_HW: Shade) -> str:
    """Return the shades as the data URI of a PNG, one pixel per value."""
    pixels = np.rint(_NEUTRAL + np.nan_to_num(shade_HW) * _LEVELS).astype(np.uint8)
    pixels[np.isnan(shade_HW)] = _MISSING
    return data_uri(png(pixels, _palette()))


def binned_ratio(load_NLE: NDArray[np.int64], columns: int) -> NDArray[np.float64]:
    """Return (columns, L, E) load ratios; neighbouring records are summed so that at most `columns` remain."""
    return np.stack([load_ratio(load_NLE[part].sum(axis=0)) for part in slices(len(load_NLE), columns)])


def _palette() -> NDArray[np.uint8]:
    colours = np.zeros((_MISSING + 1, 4), dtype=np.uint8)
    for index in range(2 * _LEVELS + 1):
        strength = (index - _NEUTRAL) / _LEVELS
        colours[index] = (*(HOT if strength > 0 else COLD), round(255 * abs(strength)))
    return colours
