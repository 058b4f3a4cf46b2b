"""How doctor gathers the facts about a machine: packages, kernels, exchange, memory and disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.doctor_verdicts import MEASURED, TEST_CONFIG, case, verdicts

from alfb_dist.cli.doctor import exchange, kernels, machine, packages
from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.device import Device, driver_version
from alfb_dist.cli.doctor.machine import (
    check_disk,
    check_limits,
)


def test_driver_version_is_read_from_proc(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert driver_version(file) is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 12"
    )
    assert driver_version(file) == "580.95.05"


def test_packages_are_compared_with_the_installed_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"Requires-Python": ">=3.11"}
    wanted = ["numpy>=2", "torch<1", "no-such-package>=1", 'peft<0; extra == "dev"', 'none; extra == "dev"']
    monkeypatch.setattr(packages.metadata, "metadata", lambda name: about)
    monkeypatch.setattr(packages.metadata, "requires", lambda name: wanted)
    results = list(packages.check_packages(Case()))
    assert verdicts(iter(results)) == {
        "python": "ok",
        "package torch": "problem",
        "package no-such-package": "problem",
        "package peft": "warning",
        "packages": "ok",
    }
    assert results[-1].found.startswith("numpy 2")


def test_missing_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "PACKAGE", "no-such-package")
    (result,) = packages.check_packages(Case())
    assert result.verdict == "problem" and result.found == "no-such-package is not installed"


def test_missing_compiler_and_switch_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALFB_NATIVE", "0")
    (off,) = kernels.check_kernels(Case())
    monkeypatch.delenv("ALFB_NATIVE")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    (none,) = kernels.check_kernels(Case())
    assert "ALFB_NATIVE" in off.fix and "no C compiler" in none.found


def rank(program: str) -> list[str]:
    """A command for `exchange.measure`, with its rank in the environment."""
    return [sys.executable, "-c", f"import os, sys, time\nrank = os.environ['RANK']\n{program}"]


def test_failed_process_of_an_exchange_is_named_with_its_last_line() -> None:
    program = "if rank == '1': sys.exit('no such device')\ntime.sleep(60)"
    started = time.monotonic()
    assert exchange.measure({}, rank=rank(program), limit=50) == "process 1 ended with 1: no such device"
    assert time.monotonic() - started < 40


def test_exchange_that_hangs_is_ended_and_leaves_no_process(tmp_path: Path) -> None:
    program = f"open(os.path.join({str(tmp_path)!r}, rank), 'w').write(str(os.getpid()))\ntime.sleep(60)"
    assert exchange.measure({}, rank=rank(program), limit=3) == "not finished within 3 s"
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_exchange_without_a_measurement_is_a_problem() -> None:
    assert exchange.measure({}, rank=rank("print('hello')"), limit=50) == "nothing was measured"


@pytest.mark.parametrize(("gpus", "verdict"), [(1, "not applicable"), (2, "ok")])
def test_nccl_is_measured_with_two_gpus(gpus: int, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []

    def measure(environment: dict[str, str]) -> dict[str, Any]:
        asked.append(environment)
        return MEASURED

    monkeypatch.setattr(exchange, "measure", measure)
    monkeypatch.setattr(exchange, "find_device", lambda: Device(None, "13.0", "580.1", ("H100",) * gpus))
    assert verdicts(exchange.check_exchange(Case())) == {"exchange over gloo": "ok", "exchange over nccl": verdict}
    assert asked == [{"DS_ACCELERATOR": "cpu"}, {"DS_ACCELERATOR": "cuda"}][: 1 + (verdict == "ok")]


def test_disk_and_memory_are_compared_with_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    given = case(f'run.folder="{tmp_path}/a/b"', f'data.cache="{tmp_path}/c"')
    assert given.estimate is not None
    assert list(tmp_path.iterdir()) == []
    runs, data = check_disk(given)
    assert runs.verdict == data.verdict == "ok"
    assert f"{3 * 12 * given.estimate.parameters / 2**20:.1f} MiB needed" in runs.found
    assert "weights, gradients and optimizer" in list(check_limits(given))[-1].found
    big = case("model.config.moe_intermediate_size=2000000000", f'run.folder="{tmp_path}"')
    assert list(check_limits(big))[-1].verdict == next(check_disk(big)).verdict == "problem"


def test_one_rank_must_fit_on_the_gpu_with_the_least_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case()
    assert given.estimate is not None and given.local_ranks == 2
    needed = given.estimate.state_bytes
    free = [needed * 4, needed + 1]
    monkeypatch.setattr(machine, "uses_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (free[i], 0))
    assert list(check_limits(given))[-1].verdict == "warning"
    free[1] = needed - 1
    assert list(check_limits(given))[-1].verdict == "problem"


def test_checkpoint_has_the_bytes_per_parameter_that_the_disk_check_assumes(tmp_path: Path) -> None:
    """Compared with a real checkpoint, without the files whose size does not depend on the parameters."""
    run = [sys.executable, "-m", "alfb_dist.cli", "train", str(TEST_CONFIG)]
    settings = ["parallel.ep_degree=1", "train.steps=2", "model.config.moe_intermediate_size=512"]
    words = [word for setting in settings for word in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([*run, *words], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=150)
    (save,) = tmp_path.glob("runs/test/checkpoints/step-*")
    parameters = case(*settings).estimate
    assert parameters is not None
    written = sum(file.stat().st_size for file in save.glob("tensors-*"))
    assert written == pytest.approx(12 * parameters.parameters, rel=0.02)
