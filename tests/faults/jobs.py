"""A training job in its own processes, which a test disturbs from outside and inspects."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from alfb_dist.distributed.rendezvous import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CONFIG = ROOT / "configs" / "test.toml"
LAUNCHERS = ("deepspeed", "torchrun", "mpirun")
WAIT_SECONDS = 150.0


def by_hand(launcher: str) -> list[str]:
    """Return the launcher's own command for two ranks, without alfb launch."""
    words = {
        "deepspeed": ["--log_level", "error", "--num_accelerators", "2", "--master_port", str(free_port())],
        "torchrun": ["--nproc-per-node", "2", "--master-port", str(free_port())],
        "mpirun": ["--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable],
    }[launcher]
    return [str(BIN / launcher), *words, str(ROOT / "launch" / "train.py"), str(CONFIG)]


def supervised(launcher: str, *options: str) -> list[str]:
    """Return the same under alfb launch."""
    return [sys.executable, "-m", "alfb_dist.cli", "launch", str(CONFIG), "--with", launcher, *options]


class Job:
    """A run of configs/test.toml, whose unique name is in the command line of each of its processes."""

    def __init__(self, folder: Path, command: list[str], *settings: str, name: str = "") -> None:
        """name: of an earlier run, to resume it."""
        self.name = name or f"job-{uuid.uuid4().hex[:12]}"
        sets = (f"run.name={self.name}", "report.wandb=disabled", "train.eval_interval=0", *settings)
        environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        environment |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        self.log, self.run_folder = folder / f"{self.name}.log", folder / "runs" / self.name
        with self.log.open("wb" if not name else "ab") as log:
            self.process = subprocess.Popen(
                [*command, *(word for setting in sets for word in ("--set", setting))],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for process in self.processes():
            process.kill()
        self.process.wait()

    def processes(self) -> list[psutil.Process]:
        """Return every running process with the name in its command line, wherever it is in the process tree."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and any(self.name in word for word in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """Return the processes that train."""
        return [p for p in self.processes() if {"RANK", "OMPI_COMM_WORLD_RANK"} & p.environ().keys()]

    def inner_launcher(self) -> psutil.Process:
        """Return the launcher that alfb launch has started."""
        return psutil.Process(self.process.pid).children()[0]

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of the run's metrics, without the fields that depend on the clock."""
        try:
            lines = (self.run_folder / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return []
        read = [json.loads(line) for line in lines if line.endswith("}")]
        return [{k: v for k, v in line.items() if k not in ("step_seconds", "tokens_per_second")} for line in read]

    def steps(self) -> list[int]:
        """Return the steps in the metrics of the run, in the order in which they were written."""
        return [line["step"] for line in self.metrics() if "loss" in line]

    def saves(self) -> list[int]:
        """Return the steps of the complete checkpoints."""
        manifests = (self.run_folder / "checkpoints").glob("step-*/manifest.json")
        return sorted(int(m.parent.name.removeprefix("step-")) for m in manifests if m.parent.suffix == "")

    def text(self) -> str:
        """Return the output of the processes."""
        return self.log.read_text(errors="replace")

    def until(self, condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> None:
        """Wait until the condition holds. Raises TimeoutError, with the end of the job's output."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or (self.process.poll() is not None and not self.processes()):
                if condition():
                    return
                raise TimeoutError(f"{what}: not within {seconds} s or before the job ended\n{self.text()[-3000:]}")
            time.sleep(0.05)

    def until_step(self, step: int) -> None:
        """Wait until the metrics have this step."""
        self.until(lambda: self.steps() and self.steps()[-1] >= step, f"step {step}")

    def end(self, seconds: float = WAIT_SECONDS) -> int:
        """Wait for the end of the command and all its processes; return its exit code as a shell shows it."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {seconds} s\n{self.text()[-3000:]}") from None
        self.until(lambda: not self.processes(), f"no orphan ({[p.cmdline()[:6] for p in self.processes()]})", 60)
        return 128 - code if code < 0 else code


def options(document: str, **further: dict[str, Any]) -> argparse.Namespace:
    """Return the options of a campaign: how often, from which seed, under which launchers, and these further ones."""
    parser = argparse.ArgumentParser(description=document.split("\n\n")[0])
    parser.add_argument("--times", type=int, default=1, help="number of tries of each case")
    parser.add_argument(
        "--first-seed", type=int, default=0, help="first of the seeds that decide when and where (default: 0)"
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, action="append", help="only this one")
    for name, words in further.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **words)
    return parser.parse_args()


def tries(arguments: argparse.Namespace, name: str, attempt: Callable[[Path, int], str]) -> int:
    """Print how many attempts succeeded, each in its own directory and with its own seed; return how many failed."""
    good = 0
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.times):
        with tempfile.TemporaryDirectory(prefix="alfb-faults-") as folder:
            found = attempt(Path(folder), seed)
        good += not found
        if found:
            print(f"  seed {seed}: {found}", flush=True)
    print(f"{name} {good}/{arguments.times}", flush=True)
    return int(arguments.times) - good


def send(job: Job, number: signal.Signals, target: str, choose: Callable[[list[Any]], Any]) -> None:
    """Send the signal to the command, to one rank, to the command's process group, or to the launcher inside."""
    if target == "command":
        job.process.send_signal(number)
    elif target == "group":
        os.killpg(job.process.pid, number)
    elif target == "rank":
        choose(job.ranks()).send_signal(number)
    else:
        job.inner_launcher().send_signal(number)
