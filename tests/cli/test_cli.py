"""The `alfb` command: output, exit codes, and errors before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from alfb_dist.cli import main
from alfb_dist.distributed.rendezvous import launched_world

ROOT = Path(__file__).parents[2]
TEST_CONFIG = str(ROOT / "configs" / "test.toml")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_printed_configuration_is_a_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", TEST_CONFIG, "--print-config", "--set", "balance.rate=0.25"]) == 0
    printed = capsys.readouterr().out
    assert "rate = 0.25" in printed
    (tmp_path / "again.toml").write_text(printed)
    assert main(["train", "--config", str(tmp_path / "again.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_dry_run_starts_nothing_and_shows_the_sizes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", TEST_CONFIG, "--dry-run", "--ranks", "4"]) == 0
    shown = capsys.readouterr().out
    assert "4 = 2 expert-parallel x 2" in shown
    assert "parameters per rank" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.stepz=3"], "did you mean train.steps?"),
        ([], "the number of ranks (1) must be divisible by parallel.ep_degree (2)"),
    ],
)
def test_an_invalid_configuration_exits_with_78_and_the_reason(
    settings: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", TEST_CONFIG, *[w for s in settings for w in ("--set", s)]]) == 78
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_rank_0_prints_the_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("alfb_dist.cli.PRINT_SECONDS", 0)
    assert launched_world() == (1, 2)
    assert main(["train", TEST_CONFIG, "--set", "train.stepz=3"]) == 78
    assert capsys.readouterr().err == ""


def test_missing_configuration_exits_with_78(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 78
    assert "no configuration given" in capsys.readouterr().err


def test_directory_that_is_not_a_run_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["report", str(tmp_path)]) == 78
    assert str(tmp_path) in capsys.readouterr().err


def test_text_becomes_token_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("text " * 10)
    assert main(["data", "prepare", str(tmp_path), "--cache", "cache"]) == 0
    shown = capsys.readouterr().out
    assert "train.tokens" in shown
    assert "skipped: 0 empty" in shown
    assert main(["data", "prepare", "missing", "--cache", "cache"]) == 78
    assert "missing" in capsys.readouterr().err


def test_directory_that_is_not_a_checkpoint_does_not_verify(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert "manifest.json" in capsys.readouterr().out


def test_entry_point_accepts_the_arguments_of_launchers() -> None:
    entry = [sys.executable, str(ROOT / "launch" / "train.py")]
    command = [*entry, "--local_rank=0", "--config", TEST_CONFIG, "--print-config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "[run]" in done.stdout
