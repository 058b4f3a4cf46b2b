"""A training job in processes of its own, to be disturbed from outside: started, looked into, seen to its end."""

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
    """The launcher's own command for two ranks, without alfb launch."""
    words = {
        "deepspeed": ["--log_level", "error", "--num_accelerators", "2", "--master_port", str(free_port())],
        "torchrun": ["--nproc-per-node", "2", "--master-port", str(free_port())],
        "mpirun": ["--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable],
    }[launcher]
    return [str(BIN / launcher), *words, str(ROOT / "launch" / "train.py"), str(CONFIG)]


def watched(launcher: str, *options: str) -> list[str]:
    """The same under alfb launch."""
    return [sys.executable, "-m", "alfb_dist.cli", "launch", str(CONFIG), "--with", launcher, *options]


class Job:
    """A run of configs/test.toml; its name, a unique marker, is in the command line of each of its processes."""

    def __init__(self, folder: Path, command: list[str], *settings: str, name: str = "") -> None:
        """name: of a run that is to be gone on with."""
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
        """Every living process with the marker in its command line, on whatever branch of the tree."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and any(self.name in word for word in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """The processes that train."""
        return [p for p in self.processes() if {"RANK", "OMPI_COMM_WORLD_RANK"} & p.environ().keys()]

    def inner_launcher(self) -> psutil.Process:
        """The launcher's command that alfb launch has started."""
        return psutil.Process(self.process.pid).children()[0]

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the run's metrics, without what depends on the clock."""
        try:
            lines = (self.run_folder / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return []
        read = [json.loads(line) for line in lines if line.endswith("}")]
        return [{k: v for k, v in line.items() if k not in ("step_seconds", "tokens_per_second")} for line in read]

    def steps(self) -> list[int]:
        """The steps in the metrics of the run, in the order in which they were written."""
        return [line["step"] for line in self.metrics() if "loss" in line]

    def saves(self) -> list[int]:
        """The steps of the whole checkpoints."""
        manifests = (self.run_folder / "checkpoints").glob("step-*/manifest.json")
        return sorted(int(m.parent.name.removeprefix("step-")) for m in manifests if m.parent.suffix == "")

    def text(self) -> str:
        """All that the processes have written."""
        return self.log.read_text(errors="replace")

    def until(self, holds: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> None:
        """It holds; TimeoutError with the job's last words otherwise."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline or (self.process.poll() is not None and not self.processes()):
                if holds():
                    return
                raise TimeoutError(f"{what}: not so after {seconds} s or the job's end\n{self.text()[-3000:]}")
            time.sleep(0.05)

    def until_step(self, step: int) -> None:
        """The metrics have come to this step."""
        self.until(lambda: self.steps() and self.steps()[-1] >= step, f"step {step}")

    def end(self, seconds: float = WAIT_SECONDS) -> int:
        """The exit code of the command, as a shell shows it, once it and all its processes have ended."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {seconds} s\n{self.text()[-3000:]}") from None
        self.until(lambda: not self.processes(), f"no orphan ({[p.cmdline()[:6] for p in self.processes()]})", 60)
        return 128 - code if code < 0 else code


def options(document: str, **further: dict[str, Any]) -> argparse.Namespace:
    """The command line of a campaign: how often, from which seed, under which launchers, and further options."""
    parser = argparse.ArgumentParser(description=document.split("\n\n")[0])
    parser.add_argument("--times", type=int, default=1, help="how often each case is tried")
    parser.add_argument("--first-seed", type=int, default=0, help="of the seeds that say when and where (default: 0)")
    parser.add_argument("--launcher", choices=LAUNCHERS, action="append", help="only this one")
    for name, words in further.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **words)
    return parser.parse_args()


def tries(asked: argparse.Namespace, name: str, attempt: Callable[[Path, int], str]) -> int:
    """How many attempts failed, each in a folder and with a seed of its own; a line tells, after what was wrong."""
    good = 0
    for seed in range(asked.first_seed, asked.first_seed + asked.times):
        with tempfile.TemporaryDirectory(prefix="alfb-faults-") as folder:
            found = attempt(Path(folder), seed)
        good += not found
        if found:
            print(f"  seed {seed}: {found}", flush=True)
    print(f"{name} {good}/{asked.times}", flush=True)
    return int(asked.times) - good


def send(job: Job, number: signal.Signals, target: str, choose: Callable[[list[Any]], Any]) -> None:
    """The signal has gone to the command, to one rank, to the command's process group, or to the launcher inside."""
    if target == "command":
        job.process.send_signal(number)
    elif target == "group":
        os.killpg(job.process.pid, number)
    elif target == "rank":
        choose(job.ranks()).send_signal(number)
    else:
        job.inner_launcher().send_signal(number)
