"""Whole runs on two hosts of two ranks: with DeepSpeed's openmpi, over a bad network, with a host cut off midway.

    make hosts-test          # python -m tests.hosts.campaign [NAME ...]: all checks, or those named; some minutes

Prints a line for each check and exits with 1 if one failed. The directory of a failed check is kept and named.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .cluster import Hosts
from .namespaces import what_is_missing
from .runs import environment, launch, same_runs, start

TIMEOUT_SECONDS = 5
CUT_STEPS, CUT_AFTER, SAVE_EVERY = 200, 50, 20


def finished(hosts: Hosts, folder: Path, name: str, ep: int, *words: str, spread: bool = True) -> Path:
    """Run to the end on both hosts or, for comparison, on host1 alone, and return the run's directory."""
    where = ("--hostfile", "hosts") if spread else ("--ranks", "4")
    command = launch(hosts, folder, name, "--set", f"parallel.ep_degree={ep}", *where, *words)
    done = hosts.run("host1", command, cwd=folder, env=environment(), timeout=900)
    (folder / f"{name}.output").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise AssertionError(f"{name} ended with {done.returncode}: {done.stderr[-500:]}")
    return folder / "runs" / name


def same(hosts: Hosts, folder: Path, ep: int, *words: str) -> str:
    """Check that two hosts give the run of one."""
    one = finished(hosts, folder, "one", ep, spread=False)
    two = finished(hosts, folder, "two", ep, *words)
    if found := same_runs(one, two):
        raise AssertionError("; ".join(found[:3]))
    return "losses, loads and biases equal those of one host to the bit"


def slow(hosts: Hosts, folder: Path) -> str:
    """Check that a bad network changes nothing but the time."""
    hosts.slow(delay_ms=20, loss=0.01)
    try:
        return same(hosts, folder, 4)
    finally:
        hosts.slow()


def cut(hosts: Hosts, folder: Path, launcher: str) -> str:
    """Cut a host off midway: it is named in time, no process is left, and the run resumes once it is back."""
    steps = ("--set", f"train.steps={CUT_STEPS}", "--set", f"train.checkpoint_interval={SAVE_EVERY}")
    steps += ("--set", "train.eval_interval=0", "--set", f"run.timeout_seconds={TIMEOUT_SECONDS}")
    straight = finished(hosts, folder, "straight", 4, *steps, spread=False)
    words = ("--set", "parallel.ep_degree=4", "--hostfile", "hosts", "--with", launcher, *steps)
    run = start(hosts, folder, launch(hosts, folder, "cut", *words))
    output = folder / "output"
    metrics = folder / "runs" / "cut" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= CUT_AFTER, 600, "the run did not start")
    hosts.link("host2", up=False)
    cut_at = time.monotonic()
    try:
        wait_for(lambda: "alfb: step " in output.read_text(), 60, "no rank reported the host that was cut off")
        seconds = time.monotonic() - cut_at
        message = next(line for line in output.read_text().splitlines() if "alfb: step " in line)
        for needed in ("rank 2 on host2", "rank 3 on host2"):
            assert needed in message, message
        wait_for(lambda: run.poll() is not None, 60, "the launching command did not end")
        assert run.returncode == 1, f"exit code {run.returncode}"
        wait_for(lambda: not any(hosts.processes(h) for h in hosts.names), 30, "processes are left behind")
    finally:
        hosts.link("host2", up=True)
    resumed = finished(hosts, folder, "cut", 4, *steps, "--with", launcher, "--set", "run.resume=true")
    if found := same_runs(straight, resumed):
        raise AssertionError("; ".join(found[:3]))
    return f"named after {seconds:.1f} s ({TIMEOUT_SECONDS} s timeout), exit code 1, no orphan, resumed to the bit"


def wait_for(condition: Callable[[], bool], seconds: float, failure: str) -> None:
    """Wait until the condition holds. Raises AssertionError(failure) after that many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(failure)
        time.sleep(0.05)


CHECKS: dict[str, Callable[[Hosts, Path], str]] = {
    "openmpi": lambda hosts, folder: same(hosts, folder, 4, "--with", "openmpi"),
    "slow": slow,
    "cut": lambda hosts, folder: cut(hosts, folder, "deepspeed"),
    "cut-mpirun": lambda hosts, folder: cut(hosts, folder, "mpirun"),
}


def main(names: list[str]) -> int:
    """Run the checks of these names, or all; return 1 if one failed."""
    if reason := what_is_missing():
        print(reason, file=sys.stderr)
        return 1
    folder, failed = Path(tempfile.mkdtemp(prefix="alfb-campaign-")), 0
    with Hosts.up(folder / "made", 2) as hosts:
        for name in names or CHECKS:
            own, started = folder / name, time.monotonic()
            own.mkdir()
            try:
                result = CHECKS[name](hosts, own)
            except AssertionError as error:
                failed += 1
                result = f"FAILED ({own}): {error}"
            print(f"{name:<16} {time.monotonic() - started:5.0f} s  {result}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
