"""report.html: a run drawn from the files in its directory."""

from __future__ import annotations

from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from alfb_dist.config.publish import publish
from alfb_dist.report.chart import HALF, Chart, Line, Reference, line_chart
from alfb_dist.report.facts import flatten, model_facts
from alfb_dist.report.figures import key_figures
from alfb_dist.report.page import page
from alfb_dist.report.panels import bias_panels, last_load, load_panels
from alfb_dist.report.redaction import redact
from alfb_dist.report.run_data import METRICS, RunData, read_run
from alfb_dist.report.wording import count, decimal, duration

_NONE_YET = '<p class="empty">No step logged yet. Draw the report again after the first step.</p>'


def write_html(run_directory: Path) -> Path:
    """Draw report.html of a running or finished run into its directory; return the file's path.

    Raises FileNotFoundError if the directory holds no run.
    """
    run = read_run(Path(run_directory))
    target = run.directory / "report.html"
    with publish(target) as temporary:
        temporary.write_text(report_page(run), encoding="utf-8")
    return target


def report_page(run: RunData) -> str:
    """Return the whole page as HTML."""
    figures = key_figures(run, {})
    charts = _training(run, figures) + _balance(run) + _cost(run) if run.training else _NONE_YET
    return page(f"{run.name} - training report", _header(run) + _tiles(run, figures) + charts + _configuration(run))


def _header(run: RunData) -> str:
    facts = "".join(f"<span>{escape(label)} <b>{escape(value)}</b></span>" for label, value in model_facts(run.config))
    metrics = run.directory / METRICS
    when = datetime.fromtimestamp(metrics.stat().st_mtime) if metrics.exists() else datetime.now()
    return (
        f"<header><h1>{escape(run.name)}</h1><p>Auxiliary-loss-free load balancing of a Mixture-of-Experts model; "
        f'last record {when:%Y-%m-%d %H:%M}</p><div class="facts">{facts}</div></header>'
    )


def _tiles(run: RunData, figures: dict[str, Any]) -> str:
    entries = [
        (
            "steps",
            _whole(figures.get("steps")),
            f"{count(figures.get('tokens'))} tokens" if "tokens" in figures else "",
        ),
        ("training loss", decimal(figures.get("last_loss")), f"first {decimal(figures.get('first_loss'))}, nats/token"),
        (
            "validation loss",
            decimal(figures.get("val_loss")),
            f"perplexity {count(figures['val_perplexity'])}" if "val_perplexity" in figures else "",
        ),
        (
            "MaxVio_batch now",
            decimal(figures.get("max_violation_batch_last")),
            f"early peak {decimal(figures.get('max_violation_batch_peak'))}",
        ),
        ("MaxVio_global", decimal(figures.get("max_violation_global")), "on the validation set"),
        (
            "tokens/s",
            count(figures["tokens_per_second"]) if "tokens_per_second" in figures else "-",
            f"total time {duration(figures['total_seconds'])}" if "total_seconds" in figures else "median",
        ),
    ]
    tiles = [
        f'<div class="tile"><span>{label}</span><b>{value}</b><small>{note}</small></div>'
        for label, value, note in entries
    ]
    return f'<section class="tiles">{"".join(tiles)}</section>' if run.training else ""


def _training(run: RunData, figures: dict[str, Any]) -> str:
    step = run.column("step")
    lines = [Line("training", step, run.column("loss"))]
    if run.evaluation:
        lines.append(Line("validation", run.evaluation_column("step"), run.evaluation_column("val_loss"), style="dots"))
    entropy = figures.get("unigram_entropy")
    loss = Chart(
        "Loss",
        "Lower is better. Below the dashed line (if drawn) the model knows more than how often each token occurs.",
        "loss (nats/token)",
        lines,
        references=[] if entropy is None else [Reference("unigram entropy", float(entropy))],
    )
    note = "Before clipping. Spikes and gaps (NaN or infinite) mark steps to look at."
    norm = _column_chart(run, "grad_norm", "Gradient norm", note, "gradient norm", from_zero=True)
    note = "The schedule as it was applied."
    rate = _column_chart(run, "lr", "Learning rate", note, "learning rate", from_zero=True)
    return _section("Training", [line_chart(loss), norm, rate])


def _column_chart(
    run: RunData, key: str, title: str, note: str, y_label: str, *, label: str = "", **options: Any
) -> str:
    """Draw a half-width chart of one value of the training records; label: of the line, by default the title."""
    line = Line(label or title.lower(), run.column("step"), run.column(key))
    return line_chart(Chart(title, note, y_label, [line], size=HALF, **options))


def _balance(run: RunData) -> str:
    labels = run.layer_labels()
    cards = [line_chart(_violation_chart(run, labels))]
    if run.loads is not None and len(run.loads.steps):
        loads = run.loads
        cards += [last_load(loads, labels), load_panels(loads, labels), bias_panels(loads, labels)]
    note = "Largest minus smallest bias, over all layers. It grows until the layers are balanced, then levels off."
    spread = _column_chart(run, "bias_range", "Bias range", note, "bias range (score)", from_zero=True)
    note = "Experts of all layers that got no token in the step. Should reach 0 and stay there."
    dead = _column_chart(run, "dead_experts", "Dead experts", note, "experts", from_zero=True, whole=True)
    return _section("Balance", [*cards, spread, dead])


def _violation_chart(run: RunData, labels: list[str]) -> Chart:
    step, violation_NL = run.column("step"), run.violation_NL()
    names = labels if len(labels) == violation_NL.shape[1] else [str(layer) for layer in range(violation_NL.shape[1])]
    faint = min(0.5, max(0.15, 8 / max(1, len(names))))  # the more lines, the fainter
    layers = [
        Line("each layer" if layer == 0 else name, step, violation_NL[:, layer], "thin", layer == 0, faint)
        for layer, name in enumerate(names)
    ]
    lines = [*layers, Line("mean over layers", step, run.column("max_violation_batch"))]
    if run.evaluation:
        x, y = run.evaluation_column("step"), run.evaluation_column("max_violation_global")
        lines.append(Line("MaxVio_global (validation)", x, y, style="dots"))
    return Chart(
        "MaxVio",
        "How far the busiest expert is above its fair share: 0 is perfect balance, 1 is twice the mean load. "
        "The scale is logarithmic above 0.1.",
        "(max - mean) / mean",
        lines,
        references=[Reference("balanced", 0.0)],
        symlog=True,
    )


def _cost(run: RunData) -> str:
    note = "Routed rows of the busiest rank over the mean of all ranks. At 1 no rank waits for another."
    even = [Reference("even", 1.0)]
    skew = _column_chart(run, "rank_skew", "Rank skew", note, "busiest rank / mean", references=even)
    note = "Training tokens per second of all ranks together, without evaluation and saving."
    speed = _column_chart(run, "tokens_per_second", "Throughput", note, "tokens/s", label="tokens/s", from_zero=True)
    return _section("Cost", [skew, speed])


def _section(title: str, cards: list[str]) -> str:
    return f'<h2>{title}</h2><section class="cards">{"".join(cards)}</section>'


def _configuration(run: RunData) -> str:
    rows = "".join(
        f"<tr><td>{escape(path)}</td><td>{escape(str(value))}</td></tr>" for path, value in flatten(redact(run.config))
    )
    return (
        f"<h2>Configuration</h2><details><summary>all settings</summary><table>{rows}</table></details>" if rows else ""
    )


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
