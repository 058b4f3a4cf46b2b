"""The reporter as the training loop uses it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.report_runs import balancing, config, evaluation_record, layer_names, training_record

from alfb_dist.report import NullReporter, Reporter, read_run


def opened(directory: Path, **changes: Any) -> Any:
    options = {"total_steps": 6, "config": config(2, 4, 6), "layer_names": layer_names(2)}
    options |= {"progress": False, "wandb": "disabled", "wandb_project": "p", "run_name": "run", "html": True}
    return Reporter(directory, **(options | changes))


def play(reporter: Any, first: int, last: int) -> None:
    for step, load_LE, bias_LE in balancing(2, 4, last):
        if step >= first:
            record = training_record(step, load_LE, bias_LE)
            reporter.advance(record)
            reporter.step(record, torch.from_numpy(load_LE), torch.from_numpy(bias_LE))
            if step % 3 == 0:
                reporter.evaluation(evaluation_record(step), torch.from_numpy(load_LE))


def public(kind: type) -> dict[str, inspect.Signature]:
    return {name: inspect.signature(value) for name, value in vars(kind).items() if not name.startswith("_")}


def test_null_reporter_has_the_reporters_methods() -> None:
    assert public(NullReporter) == public(Reporter)


def test_other_ranks_write_and_show_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reporter = NullReporter()
    play(reporter, 1, 4)
    reporter.message("text")
    reporter.close({})
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_run_directory_holds_what_was_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = opened(tmp_path / "run")
    play(reporter, 1, 6)
    reporter.close({"unigram_entropy": 3.25})
    run = read_run(tmp_path / "run")
    assert [record["step"] for record in run.training] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in run.evaluation] == [3, 6]
    assert run.loads is not None
    for (step, load_LE, bias_LE), index in zip(balancing(2, 4, 6), range(6)):
        assert run.training[index] == training_record(step, load_LE, bias_LE)
        assert (run.loads.load_NLE[index] == load_LE).all()
        assert (run.loads.bias_NLE[index] == bias_LE).all()
    assert run.summary["unigram_entropy"] == 3.25
    written = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert written == ["loads.bin", "metrics.jsonl", "report.html", "summary.json"]
    assert "unigram entropy, for comparison  3.250" in capsys.readouterr().out


def test_loads_in_other_dtypes_are_kept_as_int64_and_float32(tmp_path: Path) -> None:
    reporter = opened(tmp_path)
    load_LE, bias_LE = torch.tensor([[3, 1], [2, 2]], dtype=torch.int32), torch.zeros(2, 2, dtype=torch.float64)
    reporter.step(training_record(1, load_LE.numpy(), bias_LE.numpy()), load_LE, bias_LE)
    reporter.close({})
    loads = read_run(tmp_path).loads
    assert loads is not None
    assert loads.load_NLE.tolist() == [[[3, 1], [2, 2]]]


def test_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = opened(tmp_path / "whole"), opened(tmp_path / "resumed")
    play(whole, 1, 6)
    play(resumed, 1, 5)  # its last checkpoint is that of step 3
    resumed.close({})
    resumed = opened(tmp_path / "resumed", first_step=3)
    play(resumed, 4, 6)
    for reporter in (whole, resumed):
        reporter.close({})
    for name in ("metrics.jsonl", "loads.bin"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_full_disk_costs_one_message_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    reporter = opened(tmp_path)
    monkeypatch.setattr("alfb_dist.report.append_file.os.write", full)
    play(reporter, 1, 4)
    monkeypatch.undo()
    reporter.close({})
    messages = [line for line in capsys.readouterr().out.splitlines() if "cannot be written" in line]
    assert len(messages) == 2
    assert "metrics.jsonl" in messages[0]
    assert "No space left" in messages[0]


def test_a_second_close_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = opened(tmp_path)
    play(reporter, 1, 2)
    reporter.close({"tokens": 5})
    capsys.readouterr()
    reporter.close({"tokens": 6})
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "summary.json").read_text())["tokens"] == 5


def test_report_of_a_run_without_steps_says_so(tmp_path: Path) -> None:
    reporter = opened(tmp_path)
    reporter.close({})
    assert "No step logged yet" in (tmp_path / "report.html").read_text()


def test_newest_checkpoint_is_in_the_final_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("step-00000003", "step-00000006", "step-00000009.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    opened(tmp_path).close({})
    assert "checkpoints/step-00000006" in capsys.readouterr().out


def test_secrets_are_removed_from_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_c4n4ry_value")
    reporter = opened(tmp_path)
    reporter.message("login with hf_c4n4ry_value failed")
    reporter.close({})
    assert "login with [redacted] failed" in capsys.readouterr().out


def test_unknown_wandb_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sometimes"):
        opened(tmp_path, wandb="sometimes")
    assert list(tmp_path.iterdir()) == []
