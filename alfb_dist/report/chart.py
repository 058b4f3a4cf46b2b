"""One line chart: title, a note on how to read it, legend, lines, and the values under the pointer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from alfb_dist.report.svg import Axis, Values, downsample, extent, frame, path, value_range

WIDE, HALF = (1120, 300), (548, 230)
_MARGIN_LEFT, _MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM = 62, 14, 12, 42
_HOVER_POINTS = 400


@dataclass(frozen=True)
class Line:
    """One line. style: "main", "second", "thin" (in the background, without values under the pointer) or "dots"."""

    label: str
    x: Values
    y: Values
    style: str = "main"
    in_legend: bool = True
    opacity: float = 1.0


@dataclass(frozen=True)
class Reference:
    """A dashed, labelled horizontal line."""

    label: str
    level: float


@dataclass(frozen=True)
class Chart:
    """The content of a chart. note: one line on how to read it."""

    title: str
    note: str
    y_label: str
    lines: Sequence[Line]
    references: Sequence[Reference] = ()
    size: tuple[int, int] = WIDE
    symlog: bool = False
    from_zero: bool = False
    whole: bool = False
    x_label: str = "optimizer step"
    x_name: str = "step"  # of the value under the pointer


def line_chart(chart: Chart) -> str:
    """Draw the chart as an HTML figure."""
    legend = _legend(chart) if len(chart.lines) > 1 else ""
    has_values = any(np.isfinite(line.y).any() for line in chart.lines)
    body = _drawing(chart) if has_values else '<p class="empty">No value logged.</p>'
    return figure(chart.title, chart.note, legend + body, wide=chart.size == WIDE)


def figure(title: str, note: str, body: str, *, wide: bool = True) -> str:
    """Return an HTML figure with a title, a note on how to read it, and the body."""
    kind = "card wide" if wide else "card"
    return (
        f'<figure class="{kind}"><figcaption><h3>{escape(title)}</h3><p>{escape(note)}</p></figcaption>{body}</figure>'
    )


def axes(chart: Chart) -> tuple[Axis, Axis]:
    """Return the x and the y axis, wide enough for every line and reference."""
    width, height = chart.size
    include = (*(reference.level for reference in chart.references), *((0.0,) if chart.from_zero else ()))
    low, high = value_range([line.y for line in chart.lines], include=include)
    x_range = extent(np.concatenate([line.x for line in chart.lines]))
    x_axis = Axis(*x_range, _MARGIN_LEFT, width - _MARGIN_RIGHT)
    return x_axis, Axis(low, high, height - _MARGIN_BOTTOM, _MARGIN_TOP, symlog=chart.symlog, whole=chart.whole)


def _drawing(chart: Chart) -> str:
    width, height = chart.size
    x_axis, y_axis = axes(chart)
    parts = [frame(x_axis, y_axis, x_label=chart.x_label, y_label=chart.y_label, x_ticks=width // 100)]
    parts += [_reference(reference, x_axis, y_axis) for reference in chart.references]
    parts += [_line(line, x_axis, y_axis, points=width) for line in chart.lines]
    hover = escape(_hover(chart, x_axis), quote=True)
    return f'<svg viewBox="0 0 {width} {height}" role="img" data-hover="{hover}">{"".join(parts)}</svg>'


def _line(line: Line, x_axis: Axis, y_axis: Axis, *, points: int) -> str:
    limit = points // 4 if line.style == "thin" else points
    x, y = downsample(line.x, line.y, limit)
    x_pixels, y_pixels = x_axis.position(x), y_axis.position(y)
    title = f"<title>{escape(line.label)}</title>"
    if line.style == "dots":
        dots = "".join(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in zip(x_pixels, y_pixels) if np.isfinite(b)
        )
        return f'<g class="line dots">{title}<path d="{path(x_pixels, y_pixels)}"/>{dots}</g>'
    opacity = f' opacity="{line.opacity:.2f}"' if line.opacity < 1 else ""
    return f'<path class="line {line.style}"{opacity} d="{path(x_pixels, y_pixels)}">{title}</path>'


def _reference(reference: Reference, x_axis: Axis, y_axis: Axis) -> str:
    y = float(y_axis.position(reference.level))
    return (
        f'<line class="reference" x1="{x_axis.start:g}" x2="{x_axis.stop:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{x_axis.start + 4:g}" y="{y - 5:.1f}">{escape(reference.label)}</text>'
    )


def _legend(chart: Chart) -> str:
    entries = [
        f'<span><i class="key {line.style}"></i>{escape(line.label)}</span>' for line in chart.lines if line.in_legend
    ]
    return f'<div class="legend">{"".join(entries)}</div>'


def _hover(chart: Chart, x_axis: Axis) -> str:
    """Return what the page's script needs to show the values under the pointer: axis and foreground lines, as JSON."""
    series = []
    for line in chart.lines:
        if line.style != "thin":
            x, y = downsample(line.x, line.y, _HOVER_POINTS)
            values = [float(f"{value:.5g}") if np.isfinite(value) else None for value in y]
            series.append({"label": line.label, "x": x.tolist(), "y": values})
    return json.dumps(
        {
            "name": chart.x_name,
            "low": x_axis.low,
            "high": x_axis.high,
            "start": x_axis.start,
            "stop": x_axis.stop,
            "series": series,
        },
        separators=(",", ":"),
    )
