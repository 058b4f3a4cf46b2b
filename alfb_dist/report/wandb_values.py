"""The values logged to wandb: the same few keys for any number of layers and experts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from alfb_dist.report.heatmap import CAP, load_ratio, picture, shade

Values = dict[str, Any]

_TRAINING = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens": "train/tokens",
    "tokens_per_second": "train/tokens_per_second",
    "step_seconds": "train/step_seconds",
    "skipped": "train/skipped",
    "max_violation_batch": "balance/max_violation_batch",
    "rank_skew": "balance/rank_skew",
    "bias_range": "balance/bias_range",
    "dead_experts": "balance/dead_experts",
}
_EVALUATION = {
    "val_loss": "validation/loss",
    "val_perplexity": "validation/perplexity",
    "max_violation_global": "balance/max_violation_global",
}


def training_values(record: dict[str, Any], load_LE: np.ndarray[Any, Any] | None, layer_names: Sequence[str]) -> Values:
    """Return the record under wandb's keys; with loads, also a layer x expert picture of them."""
    values = _renamed(record, _TRAINING)
    per_layer = record.get("max_violation_batch_per_layer")
    values |= _spread("balance/max_violation_batch", np.array(per_layer or [], dtype=np.float64))
    if load_LE is not None:
        values["balance/load"] = _load_panel(record["step"], load_LE, layer_names)
    return values


def evaluation_values(record: dict[str, Any], load_LE: np.ndarray[Any, Any], layer_names: Sequence[str]) -> Values:
    """Return the record under wandb's keys, MaxVio_global over layers, and a picture of the loads."""
    values = _renamed(record, _EVALUATION)
    values |= _spread("balance/max_violation_global", load_ratio(load_LE).max(axis=1) - 1)
    values["balance/load_global"] = _load_panel(record["step"], load_LE, layer_names)
    return values


def _renamed(record: dict[str, Any], keys: dict[str, str]) -> Values:
    values: Values = {"step": record["step"]}
    return values | {name: record[key] for key, name in keys.items() if record.get(key) is not None}


def _spread(name: str, per_layer_L: np.ndarray[Any, Any]) -> Values:
    """Return the worst layer and a histogram over layers: two keys for any number of layers."""
    import wandb

    finite = per_layer_L[np.isfinite(per_layer_L)]
    if not len(finite):
        return {}
    return {f"{name}_worst_layer": float(finite.max()), f"{name}_per_layer": wandb.Histogram(finite.tolist())}


def _load_panel(step: int, load_LE: np.ndarray[Any, Any], layer_names: Sequence[str]) -> Any:
    """Return the loads as a picture with a name and MaxVio per row, in HTML, which needs no image library."""
    import wandb

    ratio_LE = load_ratio(load_LE)
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{violation:.2f}</td></tr>"
        for name, violation in zip(layer_names, ratio_LE.max(axis=1) - 1)
    )
    html = (
        "<body style='font:13px system-ui,sans-serif;background:#fff;color:#222'>"
        f"<p>Step {step}: load of every layer (row) and expert (column). Red: above the mean, full at {CAP:g} times; "
        f"blue: below it, full at 1/{CAP:g}; white: the mean.</p>"
        "<img style='width:100%;min-height:120px;image-rendering:pixelated;border:1px solid #ddd' "
        f"src='{picture(shade(ratio_LE))}'>"
        f"<table><tr><th align='left'>layer</th><th>MaxVio</th></tr>{rows}</table></body>"
    )
    return wandb.Html(html, inject=False)
