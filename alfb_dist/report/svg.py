"""Axes and lines in SVG: positions, ticks and paths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alfb_dist.report.wording import count

Values = NDArray[np.float64]
_LINEAR_UP_TO = 0.1  # a symlog axis is linear below and logarithmic above


@dataclass(frozen=True)
class Axis:
    """A scale from low..high to the pixels start..stop.

    symlog: linear near 0 and logarithmic above, for values >= 0. whole: ticks at whole numbers only.
    """

    low: float
    high: float
    start: float
    stop: float
    symlog: bool = False
    whole: bool = False

    def position(self, values: Values | float) -> Values:
        """Return the pixel of each value; NaN stays NaN."""
        low, high = self._scale(self.low), self._scale(self.high)
        share = (self._scale(np.asarray(values, dtype=np.float64)) - low) / ((high - low) or 1.0)
        return np.asarray(self.start + share * (self.stop - self.start))

    def ticks(self, wanted: int = 5) -> list[float]:
        """Return about `wanted` round values from low to high."""
        if not self.symlog:
            ticks = nice_ticks(self.low, self.high, wanted)
            return [tick for tick in ticks if not self.whole or tick == int(tick)]
        decades = [0.0, *(digit * 10.0**power for power in range(-1, 5) for digit in (1, 2, 5))]
        inside = [tick for tick in decades if self.low <= tick <= self.high]
        return inside if len(inside) <= wanted + 3 else [tick for tick in inside if f"{tick:g}".strip("0.")[:1] != "2"]

    def _scale(self, values: Values | float) -> Values:
        return np.arcsinh(np.asarray(values) / _LINEAR_UP_TO) if self.symlog else np.asarray(values)


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return about `wanted` multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    rough = span / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * 0.999)
    first = math.ceil(low / spacing - 1e-9)
    last = math.floor(high / spacing + 1e-9)
    return [round(index * spacing, 12) for index in range(first, last + 1)]


def tick_text(value: float) -> str:
    """Return a tick's label: 0, 0.05, 1.5, 20k."""
    return count(value) if abs(value) >= 10_000 else f"{value:g}"


def value_range(columns: list[Values], *, include: tuple[float, ...] = ()) -> tuple[float, float]:
    """Return the range of all finite values and of `include`, widened a little; (0, 1) if there is none."""
    joined = np.concatenate([*columns, np.array(include, dtype=np.float64)])
    known = joined[np.isfinite(joined)]
    if not len(known):
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if low in include else low - margin), high + margin


def extent(values: NDArray[Any]) -> tuple[float, float]:
    """Return the smallest and the largest value, half a unit further apart on each side if they are equal."""
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def slices(length: int, parts: int) -> list[slice]:
    """Cut range(length) into at most `parts` slices of about equal length."""
    edges = np.linspace(0, length, min(parts, length) + 1).astype(int).tolist()
    return [slice(start, stop) for start, stop in pairwise(edges)]


def downsample(x: Values, y: Values, limit: int) -> tuple[Values, Values]:
    """Keep about `limit` points: the lowest and the highest of each slice, and a gap where all of it is NaN."""
    if len(x) <= limit:
        return x, y
    kept: list[int] = []
    for part in slices(len(x), max(limit // 2, 1)):
        values = y[part]
        if np.isfinite(values).any():
            kept += sorted({part.start + int(np.nanargmin(values)), part.start + int(np.nanargmax(values))})
        else:
            kept.append(part.start)
    return x[kept], y[kept]


def path(x_pixels: Values, y_pixels: Values) -> str:
    """Return the d attribute of a line through the points, broken at NaN; a single point becomes a dot."""
    pieces: list[str] = []
    pen_down = False
    for x, y in zip(x_pixels.tolist(), y_pixels.tolist()):
        if not (math.isfinite(x) and math.isfinite(y)):
            pen_down = False
            continue
        pieces.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}" + ("" if pen_down else "h0"))
        pen_down = True
    return "".join(pieces)


def band(x_pixels: Values, low_pixels: Values, high_pixels: Values) -> str:
    """Return the points attribute of the polygon between two lines, without points that are NaN."""
    known = np.isfinite(low_pixels) & np.isfinite(high_pixels)
    x, low, high = x_pixels[known], low_pixels[known], high_pixels[known]
    corners = [*zip(x, low), *zip(x[::-1], high[::-1])]
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)


def frame(x_axis: Axis, y_axis: Axis, *, x_label: str, y_label: str, x_ticks: int = 8, y_ticks: int = 5) -> str:
    """Draw grid lines, tick labels and axis labels of a chart."""
    left, right = x_axis.start, x_axis.stop
    top, bottom = sorted((y_axis.start, y_axis.stop))
    parts = []
    for tick in y_axis.ticks(y_ticks):
        y = float(y_axis.position(tick))
        parts.append(f'<line class="grid" x1="{left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{left - 7:g}" y="{y + 4:.1f}">{tick_text(tick)}</text>')
    for tick in x_axis.ticks(x_ticks):
        x = float(x_axis.position(tick))
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:g}" y2="{bottom + 4:g}"/>')
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 17:g}">{tick_text(tick)}</text>')
    middle = (top + bottom) / 2
    parts.append(f'<line class="base" x1="{left:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}"/>')
    parts.append(f'<text class="axis end" x="{right:g}" y="{bottom + 33:g}">{escape(x_label)}</text>')
    parts.append(
        f'<text class="axis mid" transform="translate(13 {middle:g}) rotate(-90)" x="0" y="0">{escape(y_label)}</text>'
    )
    return "".join(parts)
