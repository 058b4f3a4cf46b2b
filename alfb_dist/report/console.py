"""A run on the terminal: start panel, progress, final table."""

from __future__ import annotations

import atexit
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from alfb_dist.report.wording import count, decimal, duration

_BAR_FIELDS = ("loss", "max_violation_batch", "tokens_per_second")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on the terminal."""
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


class RunConsole:
    """The terminal of one run: a progress bar on a terminal, otherwise one plain line per log interval."""

    def __init__(self, *, progress: bool, total_steps: int, first_step: int, console: Console | None = None) -> None:
        """Show nothing yet. There is a progress bar if `progress` is true and the output is a terminal."""
        self._console = console or Console(highlight=False)
        self._total_steps = total_steps
        self._first_step = first_step
        self._started = time.monotonic()
        self._shown: dict[str, Any] = {}
        self._progress = self._new_progress() if progress and self._console.is_terminal else None
        self._task = None if self._progress is None else self._new_task(self._progress)

    def start(self, name: str, facts: list[tuple[str, str]]) -> None:
        """Show the run's name and facts, and start the bar below them."""
        if self._console.is_terminal:
            self._console.print(_start_panel(name, facts))
        else:
            self._console.print(Text(name), _facts(facts), sep="\n")
        if self._progress is not None:
            self._progress.start()
            atexit.register(self.stop)  # also restores the terminal of a run that fails

    def advance(self, record: dict[str, Any]) -> None:
        """Move the bar to the record's step; without a bar show nothing."""
        self._shown |= {key: record[key] for key in _BAR_FIELDS if record.get(key) is not None}
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=record.get("step"), figures=self._bar_figures())

    def step(self, record: dict[str, Any]) -> None:
        """Show the record on the bar, or as a line of its own."""
        self.advance(record)
        if self._progress is None:
            self._plain(self._step_line(record))

    def evaluation(self, record: dict[str, Any]) -> None:
        """Show the record as a line of its own."""
        self._plain(
            f"step {record.get('step')}  validation loss {decimal(record.get('val_loss'))}  "
            f"perplexity {count(record.get('val_perplexity'))}  "
            f"MaxVio_global {decimal(record.get('max_violation_global'))}"
        )

    def message(self, text: str) -> None:
        """Show the text above the bar."""
        self._plain(text)

    def close(self, name: str, rows: list[tuple[str, str]]) -> None:
        """Remove the bar and show the rows as a table."""
        self.stop()
        if self._console.is_terminal:
            self._console.print(_final_table(name, rows))
            return
        width = max((len(label) for label, _ in rows), default=0)
        for line in (name, *(f"  {label:<{width}}  {value}" for label, value in rows)):
            self._plain(line)  # not wrapped, so that a path can be copied

    def stop(self) -> None:
        """Stop the bar and restore the cursor; a second call does nothing."""
        if self._progress is not None:
            self._progress.stop()

    def _plain(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)  # as Text, since square brackets are not markup here

    def _new_progress(self) -> Progress:
        return Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan"),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            expand=True,
            refresh_per_second=4,
        )

    def _new_task(self, progress: Progress) -> Any:
        return progress.add_task("train", total=self._total_steps, completed=self._first_step, figures="")

    def _bar_figures(self) -> str:
        loss, violation, rate = (self._shown.get(key) for key in _BAR_FIELDS)
        parts = [("loss", decimal(loss)), ("MaxVio", decimal(violation, 2)), ("tok/s", count(rate))]
        return "  ".join(f"{label} [bold]{value}[/bold]" for label, value in parts if value != "-")

    def _step_line(self, record: dict[str, Any]) -> str:
        step = record.get("step", self._first_step)
        width = len(str(self._total_steps))
        skipped = f"  skip {record['skipped']}" if record.get("skipped") else ""
        return (
            f"step {step:>{width}}/{self._total_steps}  loss {decimal(record.get('loss'))}  "
            f"MaxVio {count(record.get('max_violation_batch'))}  "
            f"{count(record.get('tokens_per_second'))} tok/s  ETA {duration(self._remaining(step))}{skipped}"
        )

    def _remaining(self, step: int) -> float:
        """Return the seconds to the last step at the mean speed so far, NaN before the first step."""
        done = step - self._first_step
        return (time.monotonic() - self._started) / done * (self._total_steps - step) if done > 0 else math.nan


def result_rows(figures: dict[str, Any], files: dict[str, Path | None]) -> list[tuple[str, str]]:
    """Return (label, value) of each row of the final table; a missing figure has no row."""
    rows = [
        ("training loss, first -> last", _pair(figures, "first_loss", "last_loss")),
        ("validation loss", _one(figures, "val_loss")),
        ("validation perplexity", _one(figures, "val_perplexity", 2)),
        ("unigram entropy, for comparison", _one(figures, "unigram_entropy")),
        ("MaxVio_batch, early peak -> now", _pair(figures, "max_violation_batch_peak", "max_violation_batch_last")),
        ("MaxVio_global, validation", _one(figures, "max_violation_global")),
        ("tokens/s, median", count(figures["tokens_per_second"]) if "tokens_per_second" in figures else ""),
        ("total time", duration(figures["total_seconds"]) if "total_seconds" in figures else ""),
    ]
    places = [(label, "" if path is None else _shown(path)) for label, path in files.items()]
    return [(label, value) for label, value in rows + places if value]


def _shown(path: Path) -> str:
    """Return the path relative to the working directory if it lies below it, else unchanged."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def _one(figures: dict[str, Any], key: str, decimals: int = 3) -> str:
    return decimal(figures[key], decimals) if key in figures else ""


def _pair(figures: dict[str, Any], first: str, last: str) -> str:
    return f"{decimal(figures[first])} -> {decimal(figures[last])}" if first in figures and last in figures else ""


def _start_panel(name: str, facts: list[tuple[str, str]]) -> Panel:
    title = Text(name, style="bold")
    return Panel(_facts(facts), title=title, title_align="left", border_style="cyan", box=box.ROUNDED)


def _facts(facts: list[tuple[str, str]]) -> Columns:
    return Columns([Text.assemble((f"{label} ", "dim"), value) for label, value in facts], padding=(0, 3))


def _final_table(name: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=Text(name, style="bold"), title_justify="left", box=box.ROUNDED, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(label), Text(value))
    return table
