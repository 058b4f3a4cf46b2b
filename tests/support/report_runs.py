"""Synthetic runs for the tests of the report: the imbalance is large at first and fades, as in a real run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alfb_dist.report.load_file import LoadFile
from alfb_dist.report.metrics_file import MetricsFile


def layer_names(num_layers: int) -> list[str]:
    return [f"model.layers.{index + 1}.mlp" for index in range(num_layers)]


def training_record(step: int, load_LE: np.ndarray, bias_LE: np.ndarray, **changes: Any) -> dict[str, Any]:
    violation_L = load_LE.max(axis=1) / load_LE.mean(axis=1) - 1
    record = {
        "step": step,
        "tokens": 4096 * step,
        "loss": 2.2 + 3.4 * math.exp(-step / 40) + 0.02 * math.sin(step),
        "lr": 3e-3 * min(1.0, step / 20),
        "grad_norm": 1.0 + math.exp(-step / 30),
        "step_seconds": 0.4,
        "tokens_per_second": 10_240.0 + 400 * math.sin(step / 3),
        "max_violation_batch": float(violation_L.mean()),
        "max_violation_batch_per_layer": violation_L.tolist(),
        "rank_skew": float(1 + violation_L.mean() / 4),
        "bias_range": float(np.ptp(bias_LE)),
        "dead_experts": int((load_LE == 0).sum()),
        "skipped": 0,
    }
    return record | changes


def evaluation_record(step: int) -> dict[str, Any]:
    loss = 2.3 + 3.4 * math.exp(-step / 40)
    return {
        "step": step,
        "val_loss": loss,
        "val_perplexity": math.exp(loss),
        "max_violation_global": 0.05 + 3 * math.exp(-step / 30),
    }


def balancing(num_layers: int, num_experts: int, steps: int, seed: int = 0) -> Iterator[tuple[int, Any, Any]]:
    """Yield (step, load_LE, bias_LE): experts of random popularity, balanced by the sign rule."""
    rng = np.random.default_rng(seed)
    popularity = rng.normal(0, 0.12, (num_layers, num_experts)) * np.linspace(1.3, 0.7, num_layers)[:, None]
    bias = np.zeros((num_layers, num_experts), dtype=np.float32)
    rate = 0.3 / max(60, steps / 3)
    for step in range(1, steps + 1):
        score = (popularity + bias) / 0.06 + rng.normal(0, 0.12, bias.shape)
        share = np.exp(score - score.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        load = np.rint(4096 * 4 * share).astype(np.int64)
        yield step, load, bias.copy()
        bias += np.float32(rate) * np.sign(load.mean(axis=1, keepdims=True) - load).astype(np.float32)


def config(num_layers: int, num_experts: int, steps: int) -> dict[str, Any]:
    model = {"hidden_size": 128, "num_hidden_layers": num_layers + 1, "n_routed_experts": num_experts}
    model |= {"num_experts_per_tok": 4, "n_shared_experts": 1}
    return {
        "config": {
            "run": {"name": "demo", "folder": "runs", "seed": 0},
            "model": {"family": "deepseek_v3", "config": model, "path": ""},
            "parallel": {"ep_degree": 2},
            "balance": {"rule": "sign", "rate": 0.01},
            "optimizer": {"lr": 3e-3},
            "data": {"sequence_length": 256},
            "train": {"steps": steps, "global_batch": 16},
        },
        "world_size": 2,
        "num_parameters": 2_345_678,
        "unigram_entropy": 3.21,
    }


def write_metrics(directory: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write the records to metrics.jsonl in the directory."""
    metrics = MetricsFile(directory / "metrics.jsonl", last_step=0)
    for record in records:
        metrics.append(record)
    metrics.close()


def write_loads(directory: Path, names: list[str], records: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> None:
    """Write each (step, load_LE, bias_LE) to loads.bin in the directory."""
    loads = LoadFile(directory / "loads.bin", layer_names=names, last_step=0)
    for record in records:
        loads.append(*record)
    loads.close()


def make_run(directory: Path, num_layers: int, num_experts: int, steps: int, *, evaluate_every: int = 50) -> Path:
    """Write a whole run of `steps` logged steps to the directory."""
    logged = list(balancing(num_layers, num_experts, steps))
    records = []
    for step, load_LE, bias_LE in logged:
        records.append(training_record(step, load_LE, bias_LE))
        if step % evaluate_every == 0:
            records.append(evaluation_record(step))
    write_metrics(directory, records)
    write_loads(directory, layer_names(num_layers), logged)
    (directory / "config.json").write_text(json.dumps(config(num_layers, num_experts, steps)))
    return directory
