"""The terminal: progress bar, plain lines and final table."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.report_runs import evaluation_record, training_record, write_metrics

from alfb_dist.report.console import RunConsole, result_rows
from alfb_dist.report.figures import key_figures
from alfb_dist.report.run_data import read_run
from alfb_dist.report.wording import count, duration, human

RECORD = training_record(10, np.array([[3, 1]]), np.zeros((1, 2)))


def plain(**options: Any) -> tuple[RunConsole, io.StringIO]:
    out = io.StringIO()
    options = {"total_steps": 100, "first_step": 0} | options
    console = RunConsole(console=Console(file=out, width=80, highlight=False), **options)
    return console, out


def test_without_a_terminal_a_logged_step_is_one_plain_line() -> None:
    console, out = plain(progress=True)
    console.advance(RECORD)
    assert out.getvalue() == ""
    console.step(RECORD)
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().startswith("step  10/100  loss ")
    assert "MaxVio 0.5 " in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_plain_lines_fit_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    console, out = plain(progress=False, total_steps=100_000)
    console.start("demo", [(f"fact {index}", "value") for index in range(20)])
    later = time.monotonic() + 100_000.0
    monkeypatch.setattr("time.monotonic", lambda: later)  # 50,000 steps took 27:46:40
    console.step(RECORD | {"step": 50_000, "loss": 12.345, "max_violation_batch": 255.49, "skipped": 12})
    assert "ETA 27:46:40  skip 12" in out.getvalue()
    console.evaluation(evaluation_record(100_000))
    console.close("demo", [("training loss, first -> last", "5.533 -> 2.469")])
    assert max(len(line) for line in out.getvalue().splitlines()) <= 80


def test_brackets_in_a_message_are_shown() -> None:
    console, out = plain(progress=False)
    console.message("[rank 0] saved to [/tmp/x]")
    assert out.getvalue() == "[rank 0] saved to [/tmp/x]\n"


def test_missing_values_and_nan_are_dashes() -> None:
    console, out = plain(progress=False)
    console.step({"step": 1, "loss": None, "max_violation_batch": float("nan"), "tokens_per_second": 10.0})
    assert "loss -  MaxVio -" in out.getvalue()


def test_on_a_terminal_the_bar_shows_step_and_figures() -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    console = RunConsole(progress=True, total_steps=100, first_step=5, console=terminal)
    console.start("demo", [("model", "tiny")])
    console.step(RECORD)
    console.stop()
    for text in ("demo", "10/100", "loss", "MaxVio", "tok/s", "ETA"):
        assert text in out.getvalue()


def test_a_failing_run_restores_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Any] = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    RunConsole(progress=True, total_steps=9, first_step=0, console=terminal).start("demo", [])
    assert "\x1b[?25l" in out.getvalue()  # the cursor is hidden
    assert "\x1b[?25h" not in out.getvalue()
    for action in at_exit:
        action()
    assert "\x1b[?25h" in out.getvalue()


def test_final_table_has_every_figure(tmp_path: Path) -> None:
    violations = [1.0, 3.0, 2.0, 0.5, 0.4, 0.3, 0.2, 0.1]
    records = [
        RECORD | {"step": step, "loss": 9.0 - step, "max_violation_batch": violation}
        for step, violation in enumerate(violations, start=1)
    ]
    evaluation = {"step": 8, "val_loss": 2.0, "val_perplexity": 7.389, "max_violation_global": 0.04}
    write_metrics(tmp_path, [*records, evaluation])
    figures = key_figures(read_run(tmp_path), {"unigram_entropy": 3.3, "total_seconds": 3725.0, "val_loss": None})
    rows = dict(result_rows(figures, {"report": tmp_path / "report.html", "checkpoint": None}))
    assert rows.pop("report").endswith("report.html")
    assert rows == {
        "training loss, first -> last": "8.000 -> 1.000",
        "validation loss": "2.000",
        "validation perplexity": "7.39",
        "unigram entropy, for comparison": "3.300",
        "MaxVio_batch, early peak -> now": "3.000 -> 0.100",
        "MaxVio_global, validation": "0.040",
        "tokens/s, median": "10.2k",
        "total time": "1:02:05",
    }


def test_the_summary_overrides_the_records(tmp_path: Path) -> None:
    write_metrics(tmp_path, [RECORD])
    (tmp_path / "summary.json").write_text('{"last_loss": 1.0, "first_loss": 4.0}')
    figures = key_figures(read_run(tmp_path), {"last_loss": 2.0})
    assert (figures["first_loss"], figures["last_loss"]) == (4.0, 2.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (999.96, "1.00k"), (12_345, "12.3k"), (671e9, "671B"), (0.0123, "0.0123"), (None, "-")],
)
def test_count_keeps_three_digits(value: float | None, text: str) -> None:
    assert count(value) == text


def test_bytes_are_in_powers_of_1024() -> None:
    assert [human(0), human(1023), human(1536), human(3 * 1024**3)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]


def test_durations_are_hours_minutes_and_seconds() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 3600, float("nan"))] == ["0:00", "1:00", "1:00:00", "-"]
