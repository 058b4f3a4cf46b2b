"""Each launcher starts two ranks that train a few steps, and all leave the same metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
COMMANDS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", "29611"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"],
    "mpirun": [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable],
}


def launched(launcher: str, folder: Path, *settings: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    """The launcher has run configs/test.toml in the folder with these settings."""
    sets = [word for s in (*settings, "report.wandb='disabled'") for word in ("--set", s)]
    command = [*COMMANDS[launcher], str(ROOT / "launch" / "train.py"), "--config", str(ROOT / "configs" / "test.toml")]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *sets], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of the run's metrics, without what depends on the clock."""
    (path,) = folder.glob("runs/*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("step_seconds", "tokens_per_second")} for line in lines]


@pytest.mark.launch
@pytest.mark.timeout(500)
def test_deepspeed_torchrun_and_mpirun_leave_the_same_metrics(tmp_path: Path) -> None:
    found = {}
    for launcher in COMMANDS:
        folder = tmp_path / launcher
        folder.mkdir()
        done = launched(launcher, folder)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found[launcher] = metrics_of(folder)
    assert any("val_loss" in line for line in found["deepspeed"])
    assert found["deepspeed"][0]["step"] == 1
    assert found["torchrun"] == found["deepspeed"]
    assert found["mpirun"] == found["deepspeed"]


@pytest.mark.launch
@pytest.mark.timeout(300)
def test_a_bad_configuration_is_refused_once_with_its_numbers_and_exit_code(tmp_path: Path) -> None:
    refused = launched("torchrun", tmp_path, "parallel.ep_degree=3")
    assert refused.returncode != 0
    told = [line for line in refused.stderr.splitlines() if line.startswith("alfb: ")]
    assert len(told) == 1
    assert "(3)" in told[0]
    assert not (tmp_path / "runs").exists()
