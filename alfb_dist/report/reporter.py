"""The reporter of a run: passes each record on to every place where it is shown or kept."""

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
        run_directory: Path,
        *,
        total_steps: int,
        first_step: int = 0,
        config: dict[str, Any],
        progress: bool,
        wandb: str,
        wandb_project: str,
        run_name: str,
        layer_names: Sequence[str],
        html: bool,
    ) -> None:
        """Cut existing files to `first_step`, show the start panel and start wandb.

        first_step: steps done before this start; later records in the files are dropped.
        wandb: "auto", "online", "offline" or "disabled"; auto is offline without an account.
        layer_names: the L MoE layers in the order of load_LE's rows.
        Raises ValueError if `wandb` is none of these.
        """
        if wandb not in ("auto", "online", "offline", "disabled"):
            raise ValueError(f'wandb ("{wandb}") must be "auto", "online", "offline" or "disabled"')
        self._directory = run_directory
        self._name = run_name
        self._layer_names = list(layer_names)
        self._html = html
        self._failed: set[str] = set()
        self._closed = False
        self._started = time.monotonic()
        self._metrics = MetricsFile(run_directory / METRICS, last_step=first_step)
        self._loads = LoadFile(run_directory / LOADS, layer_names=layer_names, last_step=first_step)
        self._console = RunConsole(progress=progress, total_steps=total_steps, first_step=first_step)
        mode = resolve_mode(wandb)
        self._console.start(run_name, [*model_facts(config), ("run directory", str(run_directory)), ("wandb", mode)])
        self._wandb = None
        if mode != "disabled":
            self._wandb = WandbSink(
                run_directory, mode=mode, project=wandb_project, run_name=run_name, config=config, show=self.message
            )

    def advance(self, record: dict[str, Any]) -> None:
        """Move the progress bar to the record's step; nothing is written."""
        self._try("terminal", self._console.advance, record)

    def step(self, record: dict[str, Any], load_LE: Tensor, bias_LE: Tensor) -> None:
        """Log a training record to metrics.jsonl, loads.bin, the terminal and wandb.

        load_LE: int64, bias_LE: float32, any device. Raises ValueError if (L, E) is not the run's.
        """
        loads = load_LE.detach().cpu().numpy().astype(np.int64)
        biases = bias_LE.detach().cpu().numpy().astype(np.float32)
        self._try(METRICS, self._metrics.append, record)
        self._try(LOADS, self._loads.append, int(record["step"]), loads, biases)
        self._try("terminal", self._console.step, record)
        if self._wandb is not None:
            self._wandb.training(record, loads, self._layer_names)

    def evaluation(self, record: dict[str, Any], load_LE: Tensor) -> None:
        """Log an evaluation record to metrics.jsonl, the terminal and wandb. load_LE: int64, of the validation set."""
        loads = load_LE.detach().cpu().numpy().astype(np.int64)
        self._try(METRICS, self._metrics.append, record)
        self._try("terminal", self._console.evaluation, record)
        if self._wandb is not None:
            self._wandb.evaluation(record, loads, self._layer_names)

    def message(self, text: str) -> None:
        """Show the text on the terminal, above the progress bar, with secrets removed."""
        try:
            self._console.message(redact(text))
        except OSError:
            self._failed.add("terminal")

    def close(self, summary: dict[str, Any]) -> None:
        """Finish wandb, write the summary, draw report.html and show the final table; a second call does nothing.

        Keys of the summary, each optional and in place of the value from the records: first_loss, last_loss, val_loss,
        val_perplexity, unigram_entropy (nats/token), max_violation_batch_peak, max_violation_batch_last,
        max_violation_global, tokens_per_second, tokens, steps, total_seconds (of this start), checkpoint (a path; by
        default the newest of the run).
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
        self._try(SUMMARY, self._write_summary, summary)
        report = self._try("report.html", write_html, self._directory) if self._html else None
        self._try("terminal", self._show_results, summary, report)

    def _write_summary(self, summary: dict[str, Any]) -> None:
        text = json.dumps(finite(summary), allow_nan=False, indent=1, default=str)
        with publish(self._directory / SUMMARY) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def _show_results(self, summary: dict[str, Any], report: Path | None) -> None:
        figures = key_figures(read_run(self._directory), summary)
        checkpoint = figures.get("checkpoint")
        files = {
            "report": report,
            "checkpoint": Path(checkpoint) if checkpoint else _newest(self._directory / "checkpoints", "step-*[0-9]"),
            "wandb": self._directory / "wandb" if (self._directory / "wandb").exists() else None,
            "metrics": self._directory / METRICS,
        }
        self._console.close(self._name, result_rows(figures, files))

    def _try(self, place: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """Return the action's result; None, with a message the first time for each place, if it raises OSError."""
        try:
            return action(*arguments)
        except OSError as error:
            if place not in self._failed:
                self._failed.add(place)
                self.message(f"report: {place} cannot be written ({error}); training continues")
            return None


class NullReporter:
    """The reporter of every rank but 0: the same methods, without effect."""

    def advance(self, record: dict[str, Any]) -> None:
        """Do nothing."""

    def step(self, record: dict[str, Any], load_LE: Tensor, bias_LE: Tensor) -> None:
        """Do nothing."""

    def evaluation(self, record: dict[str, Any], load_LE: Tensor) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""

    def close(self, summary: dict[str, Any]) -> None:
        """Do nothing."""


def _newest(directory: Path, pattern: str) -> Path | None:
    """Return the match that was modified last, None without one."""
    found = sorted(directory.glob(pattern), key=lambda path: path.stat().st_mtime) if directory.is_dir() else []
    return found[-1] if found else None
