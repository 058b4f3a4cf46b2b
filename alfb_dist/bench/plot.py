"""The page of a benchmark: bars for one case, lines for a scaling."""

from __future__ import annotations

from html import escape

import numpy as np

from alfb_dist.bench.contestants import OURS
from alfb_dist.bench.sizes import FLOOR
from alfb_dist.bench.tables import Figures, title
from alfb_dist.report.chart import Chart, Line, figure, line_chart
from alfb_dist.report.page import page
from alfb_dist.report.svg import Axis, nice_ticks, tick_text

_LEFT, _RIGHT, _WIDTH, _ROW = 210, 90, 1120, 34
_STYLES = {OURS: "main", "transformers grouped_mm": "second", "transformers eager": "dots", FLOOR: "thin"}


def bars(figures: Figures) -> str:
    """Draw a bar for each contestant: its median time over that of the bare products, with its range."""
    found = sorted(figures["results"].items(), key=lambda item: item[1]["ratio"]["median"])
    axis = Axis(0.0, 1.05 * max(one["ratio"]["max"] for _, one in found), _LEFT, _WIDTH - _RIGHT)
    height = _ROW * len(found) + 40
    parts = []
    for tick in nice_ticks(axis.low, axis.high, 8):
        x = float(axis.position(tick))
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 36}"/>')
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{height - 20}">{tick_text(tick)}</text>')
    for row, (name, one) in enumerate(found):
        low, middle, high = (float(axis.position(one["ratio"][key])) for key in ("min", "median", "max"))
        y, color = 6 + _ROW * row, "var(--main)" if name == OURS else "var(--thin)"
        size = f'width="{middle - _LEFT:.1f}" height="{_ROW - 10}"'
        text = f"{one['ratio']['median']:.2f} ({one['ms']['median']:.1f} ms)"
        parts.append(
            f'<text class="axis end" x="{_LEFT - 8}" y="{y + 18}">{escape(name)}</text>'
            f'<rect x="{_LEFT}" y="{y}" {size} fill="{color}" opacity=".75"/>'
            f'<line class="base" x1="{low:.1f}" x2="{high:.1f}" y1="{y + 12}" y2="{y + 12}"/>'
            f'<text class="tick" x="{middle + 8:.1f}" y="{y + 9}">{escape(text)}</text>'
        )
    note = "Median time of forward and backward over that of the block's bare matrix products; the line is the range."
    svg = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(parts)}</svg>'
    return figure(title(figures), note, svg)


def lines(all_figures: list[Figures], axis: str) -> str:
    """Draw milliseconds, and the ratio to the bare products, over the values of the axis."""
    x = np.array([figures["case"][axis] for figures in all_figures], dtype=np.float64)

    def chart(heading: str, note: str, y_label: str, key: str, names: list[str]) -> str:
        drawn = [
            Line(
                name,
                x,
                np.array([f["results"][name][key]["median"] for f in all_figures], dtype=np.float64),
                style=_STYLES[name],
            )
            for name in names
        ]
        return line_chart(Chart(heading, note, y_label, drawn, from_zero=True, x_label=axis, x_name=axis))

    names = [name for name in _STYLES if name in all_figures[0]["results"]]
    fixed = title(all_figures[0])
    return chart(f"time by {axis}", f"{fixed}; {axis} varies", "milliseconds", "ms", names) + chart(
        f"times the bare products by {axis}", "1 is the time of the bare matrix products", "ratio", "ratio", names[:-1]
    )


def document(all_figures: list[Figures], axis: str | None, facts: str) -> str:
    """Return the whole page as HTML; with an axis, for a scaling."""
    body = lines(all_figures, axis) if axis else "".join(bars(figures) for figures in all_figures)
    return page("alfb bench", f"<header><h1>alfb bench</h1><p>{escape(facts)}</p></header>{body}")
