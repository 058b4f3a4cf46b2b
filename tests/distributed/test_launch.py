"""Two ranks train a few steps under each launcher, with the same metrics; they are stopped, killed, restarted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults import restarts, signals
from faults.jobs import Job
from faults.signals import Case

from alfb_dist.cli import main

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
COMMANDS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", "29611"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"],
    "mpirun": [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable],
}


def launched(launcher: str, folder: Path, *settings: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    """Run configs/test.toml by the launcher, in the directory and with these settings."""
    sets = [word for s in (*settings, "report.wandb='disabled'") for word in ("--set", s)]
    command = [*COMMANDS[launcher], str(ROOT / "launch" / "train.py"), "--config", str(ROOT / "configs" / "test.toml")]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *sets], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the run's metrics, without the fields that depend on the clock."""
    (path,) = folder.glob("runs/*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("step_seconds", "tokens_per_second")} for line in lines]


@pytest.mark.launch
@pytest.mark.timeout(500)
def test_deepspeed_torchrun_and_mpirun_write_the_same_metrics(tmp_path: Path) -> None:
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
    (message,) = [line for line in refused.stderr.splitlines() if line.startswith("alfb: ")]
    assert "(3)" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.launch
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case",
    [
        Case("deepspeed", signal.SIGTERM, "command"),
        Case("torchrun", signal.SIGINT, "group"),
        Case("mpirun", signal.SIGUSR1, "rank"),
        Case("deepspeed", signal.SIGKILL, "inside"),
        Case("deepspeed", signal.SIGKILL, "command", by_hand=True),
    ],
    ids=lambda case: f"{case.launcher}-{case.number.name}-{case.target}",
)
def test_signals_end_in_a_save_with_code_75_and_no_process_left(case: Case, tmp_path: Path) -> None:
    assert signals.problem(case, tmp_path, seed=0) == ""


@pytest.mark.launch
@pytest.mark.timeout(600)
def test_a_killed_rank_costs_at_most_an_interval_and_the_run_ends_with_the_same_metrics(tmp_path: Path) -> None:
    assert restarts.problem("deepspeed", tmp_path, 0, restarts.undisturbed("torchrun", tmp_path)) == ""


# Slurm, with our own commands in place of srun and scontrol.

SRUN = """#!{python}
import os, subprocess, sys
assert os.environ["SRUN_CPUS_PER_TASK"] == os.environ["SLURM_CPUS_PER_TASK"]
words = sys.argv[1:]
ranks = int(words[words.index("--ntasks") + 1])
command = words[words.index(sys.executable):]
step = dict(SLURM_STEP_NUM_TASKS=str(ranks), SLURM_STEP_NODELIST="localhost", SLURM_STEP_ID="0", SLURM_NODEID="0")
step.update(SLURM_STEP_TASKS_PER_NODE=str(ranks))
tasks = [
    subprocess.Popen(command, env=dict(os.environ, **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)))
    for rank in range(ranks)
]
sys.exit(max(task.wait() for task in tasks))
"""


def slurm(folder: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a batch script, with commands that replace Slurm's."""
    (folder / "bin").mkdir(exist_ok=True)
    commands = {"srun": SRUN.format(python=sys.executable), "scontrol": f"#!/bin/sh\necho $* >> {folder}/scontrol\n"}
    for name, text in commands.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    # There is no srun next to this interpreter: the one on PATH is used.
    own = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_JOB_ID": str(os.getpid())}
    return {
        **own,
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_PROCID": "0",
        "SLURM_SUBMIT_DIR": str(folder),
        **variables,
    }


@pytest.mark.launch
@pytest.mark.timeout(600)
def test_slurm_job_saves_before_its_limit_is_requeued_and_resumes(tmp_path: Path, monkeypatch: Any) -> None:
    for name, value in slurm(tmp_path).items():
        monkeypatch.setenv(name, value)
    script = ["bash", str(ROOT / "launch" / "slurm.sbatch"), str(ROOT / "configs" / "test.toml")]
    with Job(tmp_path, script, "train.steps=100000", "train.checkpoint_interval=0") as job:
        job.until_step(2)
        job.process.send_signal(signal.SIGUSR1)  # to the batch script alone, as --signal=B:USR1@300 does
        assert job.end() == 75, job.text()
        assert job.saves() == job.steps()[-1:]
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"
    last = job.saves()[0]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with Job(tmp_path, script, f"train.steps={last + 2}", name=job.name) as again:
        assert again.end() == 0, again.text()
        assert again.steps() == list(range(1, last + 3))
        assert f"resumed from step-{last:08}" in again.text()


# Kubernetes: the manifest's keys, by the types of Kubeflow Trainer (pkg/apis/trainer/v1alpha1); no cluster here.

TRAINER_KEYS = {"image", "command", "args", "env", "numNodes", "resourcesPerNode", "numProcPerNode"}
JOB_KEYS = {"runtimeRef", "initializer", "trainer", "runtimePatches", "suspend", "activeDeadlineSeconds", "managedBy"}


def test_train_job_fits_its_runtime_and_starts_alfb_launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime, job = yaml.safe_load_all((ROOT / "launch" / "trainjob.yaml").read_text())
    assert {d["apiVersion"] for d in (runtime, job)} == {"trainer.kubeflow.org/v1alpha1"}
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    assert job["spec"].keys() <= JOB_KEYS and job["spec"]["trainer"].keys() <= TRAINER_KEYS
    assert runtime["spec"]["mlPolicy"] == {"numNodes": 1, "torch": {}}  # which has no keys since Trainer 2.2
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "node"
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    trainer = job["spec"]["trainer"]
    for name in ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT"):  # what Trainer sets
        monkeypatch.setenv(f"PET_{name}", "2")
    monkeypatch.chdir(ROOT)
    assert trainer["command"][0] == "alfb"
    assert main([*trainer["command"][1:], *trainer["args"], "--dry-run"]) == 0
    words = capsys.readouterr().out.split()
    assert words[0].endswith("torchrun") and words[1] == "-m"  # torchrun reads the rest from PET_ variables


@pytest.mark.parametrize("name", ["deepspeed", "mpirun", "torchrun"])
def test_scripts_are_alfb_launch_by_name(name: str) -> None:
    command = [str(ROOT / "launch" / f"{name}.sh"), str(ROOT / "configs" / "test.toml"), "--dry-run"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.split()[0]).name == name
