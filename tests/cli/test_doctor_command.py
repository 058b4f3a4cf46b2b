"""The command `alfb doctor`, on a healthy machine and on one with many problems."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alfb_dist.cli import main
from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.result import Result

TEST_CONFIG = str(Path(__file__).parents[2] / "configs" / "test.toml")
BIN = Path(sys.executable).parent
SECRET = "canary-0123456789abcdef"


def doctor(*words: str, directory: Path, **environment: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The command's exit code, and its results by check."""
    command = [sys.executable, "-m", "alfb_dist.cli", "doctor", *words, "--json"]
    given = {"PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "WANDB_API_KEY": SECRET}
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **given, **environment},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert SECRET not in done.stdout + done.stderr
    assert done.stdout, done.stderr
    return done.returncode, {result["check"]: result for result in json.loads(done.stdout)}


def test_healthy_machine_has_exit_code_0(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    code, found = doctor(TEST_CONFIG, directory=tmp_path, MASTER_PORT=port)
    assert {key for result in found.values() for key in result} == {"check", "verdict", "found", "fix"}
    problems = [result for result in found.values() if result["verdict"] == "problem"]
    assert (code, problems) == (0, [])
    for check in ("python", "packages", "accelerator", "launcher deepspeed", "master port", "interface", "clock"):
        assert found[check]["verdict"] == "ok", found[check]
    assert found["exchange over gloo"]["verdict"] == "ok"
    assert "B/s each way" in found["exchange over gloo"]["found"]
    assert found["wandb"]["verdict"] == "not applicable"  # disabled by the configuration
    assert found["config: balance.rate"]["found"] == "0.01 for sigmoid scores"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hosts"]  # nothing is left behind


def test_problems_are_reported_with_fixes_and_exit_code_1(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        code, found = doctor(
            TEST_CONFIG,
            *("--set", "train.stepz=3", "--set", "parallel.ep_degree=3", "--hostfile", "no-such-file"),
            directory=tmp_path,
            PATH="/usr/bin:/bin",
            DS_ACCELERATOR="cuda",
            GLOO_SOCKET_IFNAME="none0",
            MASTER_PORT=str(server.getsockname()[1]),
            ALFB_NATIVE="0",
        )
    verdicts = {check: result["verdict"] for check, result in found.items()}
    assert code == 1
    for check in (
        "accelerator",
        "launcher deepspeed",
        "hostfile",
        "GLOO_SOCKET_IFNAME",
        "exchange over gloo",
        "config",
    ):
        assert verdicts[check] == "problem", found
    for check in ("master port", "compiled kernels"):
        assert verdicts[check] == "warning", found
    assert "none0" in found["GLOO_SOCKET_IFNAME"]["found"]
    assert found["exchange over gloo"]["found"].startswith("process ")
    assert all(result["fix"] for result in found.values() if result["verdict"] in ("warning", "problem"))


def test_the_table_has_a_line_for_each_result_and_its_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [Result("a check", "ok", "fine"), Result("another", "warning", "[odd]", "do that")]
    asked: list[Case] = []

    def examine(case: Case) -> list[Result]:
        asked.append(case)
        return results

    monkeypatch.setattr("alfb_dist.cli.doctor.examine.examine", examine)
    assert main(["doctor", TEST_CONFIG, "--set", "run.name=x"]) == 0
    shown = capsys.readouterr().out
    assert asked[0].config is not None and asked[0].config.run.name == "x"
    for words in ("a check", "ok", "fine", "another", "warning", "[odd]", "-> do that", "0 problems, 1 warnings"):
        assert words in shown
    results.append(Result("third", "problem", "broken", "fix it"))
    assert main(["doctor"]) == 1
    assert "1 problems" in capsys.readouterr().out


def test_a_hostfile_gives_hosts_and_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases: list[Case] = []

    def examine(case: Case) -> list[Result]:
        cases.append(case)
        return []

    monkeypatch.setattr("alfb_dist.cli.doctor.examine.examine", examine)
    file = tmp_path / "hosts"
    file.write_text("a slots=2\nb slots=4\n")
    assert main(["doctor", "--hostfile", str(file)]) == 0
    assert (cases[0].hosts, cases[0].world_size, cases[0].local_ranks) == ({"a": 2, "b": 4}, 6, 4)
    main(["doctor", TEST_CONFIG, "--hostfile", str(file)])
    assert "the number of ranks (6)" in " ".join(cases[1].config_problems)
    file.write_text("a slots\n")
    main(["doctor", "--hostfile", str(file)])
    assert not cases[2].hosts and cases[2].hostfile_error
