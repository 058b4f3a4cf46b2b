"""The reporter of a run: one record in, every place where it is shown or kept out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from alfb_dist.config.publish import publish
from alfb_dist.report.console import RunConsole, result_rows
from alfb_dist.report.facts import model_facts
from alfb_dist.report.figures import key_figures
from alfb_dist.report.html import write_html
from alfb_dist.report.load_file import LoadFile
from alfb_dist.report.metrics_file import MetricsFile, finite
from alfb_dist.report.redaction import redact
from alfb_dist.report.run_data import LOADS, METRICS, SUMMARY, read_run
from alfb_dist.report.wandb_sink import WandbSink, resolve_mode


class Reporter:
    """Writes, draws and logs the records of one run. A full disk or a lost tracker costs a message, never the run."""

    def __init__(
        self,
        run_folder: Path,
        *,
        total_steps: int,
        first_step: int,
        config: dict[str, Any],
        progress: bool,
        wandb: str,
        wandb_project: str,
        run_name: str,
        layer_names: Sequence[str],
        html: bool,
    ) -> None:
        """Files are cut to `first_step`, the start panel stands on the terminal, and wandb is starting."""
        self._folder = run_folder
        self._name = run_name
        self._layer_names = list(layer_names)
        self._html = html
        self._complained: set[str] = set()
        self._closed = False
        self._started = time.monotonic()
        self._metrics = MetricsFile(run_folder / METRICS, last_step=first_step)
        self._loads = LoadFile(run_folder / LOADS, layer_names=layer_names, last_step=first_step)
        self._console = RunConsole(progress=progress, total_steps=total_steps, first_step=first_step)
        mode = resolve_mode(wandb)
        self._console.start(run_name, [*model_facts(config), ("run folder", str(run_folder)), ("wandb", mode)])
        self._wandb = None
        if mode != "disabled":
            self._wandb = WandbSink(
                run_folder, mode=mode, project=wandb_project, run_name=run_name, config=config, say=self.message
            )

    def advance(self, record: dict[str, Any]) -> None:
        """The progress bar stands at the record's step; nothing is written."""
        self._try("terminal", self._console.advance, record)

    def step(self, record: dict[str, Any], load_LE: Tensor, bias_LE: Tensor) -> None:
        """The training record is in metrics.jsonl, its loads and biases in loads.bin, on the terminal, and at wandb.

        load_LE: int64, bias_LE: float32, any device. Raises ValueError for another (L, E) than the run's.
        """
        loads = load_LE.detach().cpu().numpy().astype(np.int64)
        biases = bias_LE.detach().cpu().numpy().astype(np.float32)
        self._try(METRICS, self._metrics.append, record)
        self._try(LOADS, self._loads.append, int(record["step"]), loads, biases)
        self._try("terminal", self._console.step, record)
        if self._wandb is not None:
            self._wandb.training(record, loads, self._layer_names)

    def evaluation(self, record: dict[str, Any], load_LE: Tensor) -> None:
        """The evaluation record is in metrics.jsonl, on the terminal, and at wandb. load_LE: int64, validation set."""
        loads = load_LE.detach().cpu().numpy().astype(np.int64)
        self._try(METRICS, self._metrics.append, record)
        self._try("terminal", self._console.evaluation, record)
        if self._wandb is not None:
            self._wandb.evaluation(record, loads, self._layer_names)

    def message(self, text: str) -> None:
        """The text stands on the terminal, above the progress bar."""
        try:
            self._console.message(redact(text))
        except OSError:
            self._complained.add("terminal")

    def close(self, summary: dict[str, Any]) -> None:
        """wandb has finished or was left behind, the summary is kept, report.html drawn, and the final table shown.

        Keys of the summary, each optional and taken before what the records tell: first_loss, last_loss, val_loss,
        val_perplexity, unigram_entropy (nats/token), max_violation_batch_peak, max_violation_batch_last,
        max_violation_global, tokens_per_second, tokens, steps, total_seconds (of this start), checkpoint (a path; else
        the newest in the run folder). A second call changes nothing.
        """
        if self._closed:
            return
        self._closed = True
        summary = {"total_seconds": time.monotonic() - self._started} | summary
        self._try("terminal", self._console.stop)
        if self._wandb is not None:
            self._wandb.close()
        self._metrics.close()
        self._loads.close()
        self._try(SUMMARY, self._keep_summary, summary)
        report = self._try("report.html", write_html, self._folder) if self._html else None
        self._try("terminal", self._show_results, summary, report)

    def _keep_summary(self, summary: dict[str, Any]) -> None:
        text = json.dumps(finite(summary), allow_nan=False, indent=1, default=str)
        with publish(self._folder / SUMMARY) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def _show_results(self, summary: dict[str, Any], report: Path | None) -> None:
        figures = key_figures(read_run(self._folder), summary)
        stated = figures.get("checkpoint")
        files = {
            "report": report,
            "checkpoint": Path(stated) if stated else _newest(self._folder / "checkpoints", "step-*[0-9]"),
            "wandb": self._folder / "wandb" if (self._folder / "wandb").exists() else None,
            "metrics": self._folder / METRICS,
        }
        self._console.close(self._name, result_rows(figures, files))

    def _try(self, place: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """The action's result; None, and one message a place, if the operating system refuses."""
        try:
            return action(*arguments)
        except OSError as error:
            if place not in self._complained:
                self._complained.add(place)
                self.message(f"report: {place} cannot be written ({error}); training goes on")
            return None


class NullReporter:
    """The reporter of every rank but 0: the same methods, each of which does nothing."""

    def advance(self, record: dict[str, Any]) -> None:
        """Nothing has happened."""

    def step(self, record: dict[str, Any], load_LE: Tensor, bias_LE: Tensor) -> None:
        """Nothing has happened."""

    def evaluation(self, record: dict[str, Any], load_LE: Tensor) -> None:
        """Nothing has happened."""

    def message(self, text: str) -> None:
        """Nothing has happened."""

    def close(self, summary: dict[str, Any]) -> None:
        """Nothing has happened."""


def open_reporter(
    run_folder: Path,
    *,
    rank: int,
    total_steps: int,
    first_step: int = 0,
    config: dict[str, Any],
    progress: bool,
    wandb: str,
    wandb_project: str,
    run_name: str,
    layer_names: Sequence[str],
    html: bool,
) -> Reporter | NullReporter:
    """The reporter of this rank: a Reporter on rank 0, a NullReporter elsewhere.

    first_step: steps done before this start; what the files hold beyond it is dropped.
    wandb: "auto", "online", "offline" or "disabled"; auto is offline without an account.
    layer_names: the L MoE layers in the order of load_LE's rows.
    """
    if wandb not in ("auto", "online", "offline", "disabled"):
        raise ValueError(f'wandb ("{wandb}") must be "auto", "online", "offline" or "disabled"')
    if rank != 0:
        return NullReporter()
    return Reporter(
        Path(run_folder),
        total_steps=total_steps,
        first_step=first_step,
        config=config,
        progress=progress,
        wandb=wandb,
        wandb_project=wandb_project,
        run_name=run_name,
        layer_names=layer_names,
        html=html,
    )


def _newest(folder: Path, pattern: str) -> Path | None:
    """The last match by time of change, None without one."""
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime) if folder.is_dir() else []
    return found[-1] if found else None
