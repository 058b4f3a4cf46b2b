"""wandb: the run continues whatever wandb does, and no secret is sent."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from support.report_runs import balancing, config, evaluation_record, layer_names, training_record

from alfb_dist.report import Reporter, wandb_sink
from alfb_dist.report.metrics_file import read_metrics
from alfb_dist.report.wandb_values import evaluation_values, training_values

STEPS = 4
Run = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(mode): a whole run of STEPS steps through the reporter; returns its messages about wandb."""

    def play(mode: str, **options: Any) -> list[str]:
        reporter = Reporter(
            tmp_path / "run",
            total_steps=STEPS,
            config=config(2, 4, STEPS) | options,
            progress=False,
            wandb=mode,
            wandb_project="project",
            run_name="run",
            layer_names=layer_names(2),
            html=True,
        )
        for step, load_LE, bias_LE in balancing(2, 4, STEPS):
            record = training_record(step, load_LE, bias_LE)
            reporter.advance(record)
            reporter.step(record, torch.from_numpy(load_LE), torch.from_numpy(bias_LE))
        reporter.evaluation(evaluation_record(STEPS), torch.from_numpy(load_LE))
        reporter.close({})
        captured = capsys.readouterr()
        assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 4]
        assert (tmp_path / "run" / "report.html").exists()
        return [line for line in captured.out.splitlines() if line.startswith("wandb: ")]

    return play


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.finished = 0

    def define_metric(self, *names: str, **options: str) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def fake_init(monkeypatch: pytest.MonkeyPatch, fake: FakeRun, refused: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """wandb.init returns `fake`, or raises for a refused mode; the arguments of every call."""
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> FakeRun:
        calls.append(options)
        if options["mode"] in refused:
            raise RuntimeError("no\nserver")
        return fake

    monkeypatch.setattr(wandb, "init", init)
    return calls


def test_every_record_is_logged_and_the_run_finished(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeRun()
    calls = fake_init(monkeypatch, fake)
    assert run("auto") == []
    assert [values["step"] for values in fake.logged] == [1, 2, 3, 4, 4]
    assert fake.logged[3]["train/loss"] == pytest.approx(5.2, abs=0.3)
    assert fake.logged[4]["validation/loss"] == evaluation_record(4)["val_loss"]
    assert fake.finished == 1
    (call,) = calls
    assert (call["mode"], call["project"], call["name"]) == ("offline", "project", "run")
    assert call["dir"] == str(tmp_path / "run")
    settings = call["settings"]
    assert settings.init_timeout <= 15
    assert settings.finish_timeout <= 15
    assert settings.disable_git
    assert settings.x_disable_meta
    assert settings.console == "off"
    assert not settings.save_code


def test_wandb_that_does_not_start_costs_one_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_init(monkeypatch, FakeRun(), refused=("offline",))
    (message,) = run("offline")
    assert "off, since it does not start: RuntimeError: no" in message


def test_unreachable_server_falls_back_to_offline(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    fake = FakeRun()
    calls = fake_init(monkeypatch, fake, refused=("online",))
    (message,) = run("auto")
    assert "recording offline" in message
    assert [call["mode"] for call in calls] == ["online", "offline"]
    assert calls[0]["id"] != calls[1]["id"]  # an id whose start failed stays in use
    assert len(fake.logged) == STEPS + 1


def test_refused_log_costs_one_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(FakeRun):
        def log(self, values: dict[str, Any]) -> None:
            super().log(values)
            if len(self.logged) == 2:
                raise BrokenPipeError("gone")

    fake = Refusing()
    fake_init(monkeypatch, fake)
    (message,) = run("offline")
    assert "off from here on (BrokenPipeError: gone)" in message
    assert len(fake.logged) == 2


def test_failing_finish_costs_one_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(FakeRun):
        def finish(self) -> None:
            raise TimeoutError("no answer")

    fake_init(monkeypatch, Stuck())
    (message,) = run("offline")
    assert "not finished cleanly (TimeoutError: no answer)" in message


def test_hanging_start_delays_no_step_and_the_end_for_a_bounded_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_sink, "_CLOSE_SECONDS", 0.3)
    monkeypatch.setattr(wandb_sink, "_QUEUED", 2)
    released = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: released.wait(10))
    started = time.monotonic()
    (message,) = run("offline")
    assert time.monotonic() - started < 2
    assert "not finished after" in message
    released.set()


def test_hanging_finish_is_abandoned_after_a_bounded_time_and_then_silent(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released, threads = threading.Event(), []

    class Hanging(FakeRun):
        def finish(self) -> None:
            threads.append(threading.current_thread())
            released.wait(20)
            raise RuntimeError("much too late")

    monkeypatch.setattr(wandb_sink, "_CLOSE_SECONDS", 0.3)
    fake_init(monkeypatch, Hanging())
    started = time.monotonic()
    (message,) = run("offline")
    assert 0.3 <= time.monotonic() - started < 5
    assert "not finished after 0.3 s" in message
    released.set()
    threads[0].join(5)
    assert "much too late" not in capsys.readouterr().out


@pytest.mark.parametrize("before", ["bad key ", "x" * 140])  # the second is truncated within the key
def test_secret_in_an_error_of_wandb_is_not_shown(run: Run, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k4n4ry" * 7)

    def init(**_: Any) -> None:
        raise RuntimeError(before + "k4n4ry" * 7)

    monkeypatch.setattr(wandb, "init", init)
    (message,) = run("offline")
    assert f"{before}[redacted]" in message
    assert "k4n4ry" not in message


def test_missing_package_costs_one_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    (message,) = run("offline")
    assert "off, since it does not start" in message


def test_disabled_starts_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake_init(monkeypatch, FakeRun())
    assert run("disabled") == []
    assert calls == []


def test_auto_is_online_only_with_an_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert wandb_sink.resolve_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n login user\n password secret\n")
    assert wandb_sink.resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_sink.resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_sink.resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_sink.resolve_mode("auto") == "offline"
    assert wandb_sink.resolve_mode("online") == "online"


def test_online_without_an_account_contacts_nobody(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_init(monkeypatch, FakeRun())
    (message,) = run("online")
    assert "no account" in message
    assert [call["mode"] for call in calls] == ["offline"]


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 2), (3, 16), (58, 256)])
def test_number_of_keys_is_the_same_for_any_size(num_layers: int, num_experts: int) -> None:
    load_LE = np.random.default_rng(0).integers(1, 100, (num_layers, num_experts))
    record = training_record(1, load_LE, np.zeros((num_layers, num_experts)))
    names = layer_names(num_layers)
    keys = set(training_values(record, load_LE, names)) | set(evaluation_values(evaluation_record(1), load_LE, names))
    assert len(keys) == 21


def test_no_secret_is_in_any_file_of_a_real_offline_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    canaries = {"WANDB_API_KEY": "k4n4ry" * 7, "HF_TOKEN": "hf_c4n4ry_value", "MY_SECRET": "s3cret-c4n4ry"}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "--c4n4ry-argument"])
    assert run("offline", note=f"token {canaries['HF_TOKEN']}") == []
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    for path in written:
        content = path.read_bytes()
        assert b"4n4ry" not in content, path
    tracked = next(path.read_bytes() for path in written if path.suffix == ".wandb")
    assert b"[redacted]" in tracked
    for private in (os.getcwd(), "train.py"):
        assert private.encode() not in tracked
