"""Small multiples: one panel per MoE layer for loads and for biases, and one picture of all layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

import numpy as np

from alfb_dist.report.chart import figure
from alfb_dist.report.heatmap import CAP, COLD, HOT, Shade, binned_ratio, load_ratio, picture, shade
from alfb_dist.report.load_file import Loads
from alfb_dist.report.svg import Axis, Values, band, extent, frame, path, slices, tick_text, value_range

_WIDTH, _HEIGHT = 300, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 8, 40
_PIXELS = 1_400_000  # of all load pictures together, which keeps the page under 3 MB
_MAX_COLUMNS = 400
_POINTS = 80_000  # of all bias lines together
_MAX_BIAS_LINES = 32  # experts; of more, bands are readable and lines are not
_OPEN_PANELS = 12


def load_panels(loads: Loads, labels: Sequence[str]) -> str:
    """Draw for each layer the load of every expert over the run as colour."""
    _, num_layers, num_experts = loads.shape
    columns = max(20, min(_MAX_COLUMNS, _PIXELS // (num_layers * num_experts)))
    shade_LEC = np.moveaxis(shade(binned_ratio(loads.load_NLE, columns)), 0, -1)
    steps = [int(loads.steps[part.start]) for part in slices(len(loads.steps), columns)]
    x_axis = Axis(*extent(loads.steps), _LEFT, _WIDTH - _RIGHT)
    panels = [_load_panel(label, shade_EC, x_axis) for label, shade_EC in zip(labels, shade_LEC)]
    note = (
        "One row per expert, time runs to the right. No colour: the expert gets its fair share of tokens. "
        "Red: too many, blue: too few. A balanced layer fades to the background."
    )
    body = _colour_key() + _grid(panels, data=f"data-steps='{json.dumps(steps)}' data-cap='{CAP:g}'")
    return figure("Expert load, layer by layer", note, body)


def last_load(loads: Loads, labels: Sequence[str]) -> str:
    """Draw the load of all layers and experts at the last logged step in one picture."""
    num_layers, num_experts = loads.shape[1:]
    height = min(520, max(90, 14 * num_layers)) + _BOTTOM
    x_axis = Axis(-0.5, num_experts - 0.5, 74, 1106, whole=True)
    step = int(loads.steps[-1])
    body = _matrix(shade(load_ratio(loads.load_NLE[-1])), list(labels), x_axis, height)
    note = "One row per MoE layer, one column per expert; colours as in the panels below."
    data = f"data-cap='{CAP:g}' data-rows='{escape(json.dumps(list(labels)), quote=True)}'"
    return figure(f"Load of every expert at step {step}", note, f"{_colour_key()}<div {data}>{body}</div>")


def bias_panels(loads: Loads, labels: Sequence[str]) -> str:
    """Draw for each layer the routing biases over the run: lines for few experts, bands for many."""
    num_records, num_layers, num_experts = loads.shape
    as_lines = num_experts <= _MAX_BIAS_LINES
    per_line = _POINTS // (num_layers * (num_experts if as_lines else 5))
    kept = np.unique(np.linspace(0, num_records - 1, max(12, min(200, per_line))).astype(int))
    steps, bias_NLE = loads.steps[kept].astype(np.float64), loads.bias_NLE[kept].astype(np.float64)
    low, high = value_range([bias_NLE.ravel()], include=(0.0,))
    x_axis = Axis(*extent(steps), _LEFT, _WIDTH - _RIGHT)
    y_axis = Axis(min(low, -high * 0.02), max(high, -low * 0.02), _HEIGHT - _BOTTOM, _TOP)
    draw = _bias_lines if as_lines else _bias_bands
    panels = [
        _panel(
            label, _frame(x_axis, y_axis, "bias (score)") + _zero(x_axis, y_axis) + draw(x_axis, y_axis, steps, bias)
        )
        for label, bias in zip(labels, np.moveaxis(bias_NLE, 1, 0))
    ]
    note = (
        "What the update rule adds to an expert's score when experts are chosen. It rises while the expert gets too "
        "few tokens, falls while it gets too many, and levels off in balance. All panels share one scale."
    )
    return figure("Routing bias, layer by layer", note, _bias_key(as_lines) + _grid(panels))


def _load_panel(label: str, shade_EC: Shade, x_axis: Axis) -> str:
    num_experts = len(shade_EC)
    y_axis = Axis(-0.5, num_experts - 0.5, _TOP, _HEIGHT - _BOTTOM, whole=True)  # expert 0 on top
    image = _image(shade_EC, x_axis.start, _TOP, x_axis.stop - x_axis.start, _HEIGHT - _BOTTOM - _TOP, label)
    return _panel(label, _frame(x_axis, y_axis, "expert") + image)


def _matrix(shade_LE: Shade, labels: list[str], x_axis: Axis, height: int) -> str:
    """Draw the layers x experts picture with the layers' names."""
    bottom = height - _BOTTOM
    y_axis = Axis(0, len(labels), 8, bottom)
    image = _image(shade_LE, x_axis.start, 8, x_axis.stop - x_axis.start, bottom - 8, "")
    every = max(1, len(labels) * 14 // bottom + (len(labels) > 30))
    names = "".join(
        f'<text class="tick end" x="{x_axis.start - 7:g}" y="{float(y_axis.position(row + 0.5)) + 4:.1f}">'
        f"{escape(labels[row])}</text>"
        for row in range(0, len(labels), every)
    )
    ticks = "".join(
        f'<text class="tick mid" x="{float(x_axis.position(tick)):.1f}" y="{bottom + 17}">{tick_text(tick)}</text>'
        for tick in x_axis.ticks(12)
    )
    label = f'<text class="axis end" x="{x_axis.stop:g}" y="{bottom + 33}">expert</text>'
    return f'<svg viewBox="0 0 1120 {height}" role="img">{image}{names}{ticks}{label}</svg>'


def _image(shade_HW: Shade, x: float, y: float, width: float, height: float, label: str) -> str:
    rows, columns = shade_HW.shape
    return (
        f'<rect class="plate" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'
        f'<image class="heat" data-shape="{rows},{columns}" data-layer="{escape(label, quote=True)}" x="{x:g}" '
        f'y="{y:g}" width="{width:g}" height="{height:g}" preserveAspectRatio="none" href="{picture(shade_HW)}"/>'
    )


def _bias_lines(x_axis: Axis, y_axis: Axis, steps: Values, bias_NE: Values) -> str:
    x = x_axis.position(steps)
    lines = []
    for expert, bias_N in enumerate(bias_NE.T):
        side = "below" if bias_N[-1] >= 0 else "above"  # of the mean load, which the bias works against
        title = f"<title>expert {expert}, bias {bias_N[-1]:.4g} at the end</title>"
        lines.append(f'<path class="line bias {side}" d="{path(x, y_axis.position(bias_N))}">{title}</path>')
    return "".join(lines)


def _bias_bands(x_axis: Axis, y_axis: Axis, steps: Values, bias_NE: Values) -> str:
    x = x_axis.position(steps)
    levels = [y_axis.position(level) for level in np.percentile(bias_NE, [0, 10, 50, 90, 100], axis=1)]
    return (
        f'<polygon class="band outer" points="{band(x, levels[0], levels[4])}"/>'
        f'<polygon class="band inner" points="{band(x, levels[1], levels[3])}"/>'
        f'<path class="line main" d="{path(x, levels[2])}"/>'
    )


def _bias_key(as_lines: bool) -> str:
    entries = (
        [("bias below", "expert that would get too few tokens"), ("bias above", "expert that would get too many")]
        if as_lines
        else [("main", "median expert"), ("inner", "10 to 90 % of experts"), ("outer", "all experts")]
    )
    spans = "".join(f'<span><i class="key {style}"></i>{text}</span>' for style, text in entries)
    return f'<div class="legend">{spans}</div>'


def _colour_key() -> str:
    cold, hot = (f"rgba({','.join(map(str, colour))}" for colour in (COLD, HOT))
    bar = (
        f'<i class="ramp" style="background:linear-gradient(90deg,{cold},1),{cold},0) 50%,{hot},0) 50%,{hot},1))"></i>'
    )
    return (
        f'<div class="legend ramp-key"><span>&le; 1/{CAP:g} of the mean load</span>{bar}'
        f"<span>&ge; {CAP:g} times the mean</span><span>logarithmic; no colour = mean load</span></div>"
    )


def _grid(panels: list[str], data: str = "") -> str:
    """Show the first panels and fold the rest away."""
    shown, hidden = panels[:_OPEN_PANELS], panels[_OPEN_PANELS:]
    grid = f'<div class="panels">{"".join(shown)}</div>'
    if hidden:
        summary = f"<summary>{len(hidden)} more layers</summary>"
        grid += f'<details>{summary}<div class="panels">{"".join(hidden)}</div></details>'
    return f"<div {data}>{grid}</div>"


def _panel(label: str, body: str) -> str:
    drawing = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{body}</svg>'
    return f'<div class="panel"><h4>{escape(label)}</h4>{drawing}</div>'


def _frame(x_axis: Axis, y_axis: Axis, y_label: str) -> str:
    return frame(x_axis, y_axis, x_label="optimizer step", y_label=y_label, x_ticks=3, y_ticks=4)


def _zero(x_axis: Axis, y_axis: Axis) -> str:
    y = float(y_axis.position(0.0))
    return f'<line class="reference" x1="{x_axis.start:g}" x2="{x_axis.stop:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
