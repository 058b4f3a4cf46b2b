"""Step time by the delay between two hosts, with the time in exchanges, as a table in Markdown.

    python -m tests.hosts.delays                       # the demo's model, two hosts of two ranks; some minutes

During a run the link between the hosts gets slower; the medians over the steps at each delay are printed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .cluster import Hosts
from .runs import ROOT, environment

DELAYS_MS = (None, 0.0, 1.0, 5.0, 20.0)  # one way; None is the kernel's bridge, the others go through slow_link.py
STEPS_EACH, SETTLE = 12, 3


def measure(hosts: Hosts, folder: Path, ep: int) -> list[dict[str, Any]]:
    """Return a row for each delay."""
    folder.mkdir()
    times = folder / "times"
    times.touch()
    (folder / "hosts").write_text("".join(f"{host} slots=2\n" for host in hosts.names))
    variables = {**environment(), "TIMES": str(times)}
    names = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "PATH", "TIMES")
    (folder / ".deepspeed_env").write_text("".join(f"{name}={variables[name]}\n" for name in names))
    steps = STEPS_EACH * len(DELAYS_MS)
    words = ["deepspeed", "--hostfile", "hosts", "--no_ssh_check", "--master_addr", hosts.address("host1")]
    words += [str(Path(__file__).with_name("timed_train.py")), "--config", str(ROOT / "configs" / "demo.toml")]
    for setting in (f"parallel.ep_degree={ep}", f"train.steps={steps}", "train.micro_batch=4", "train.eval_interval=0"):
        words += ["--set", setting]
    words += ["--set", "train.checkpoint_interval=0", "--set", "report.wandb='disabled'"]
    hosts.slow()
    rows = []
    with (folder / "output").open("w") as out:
        run = hosts.popen("host1", words, cwd=folder, env=variables, stdout=out, stderr=subprocess.STDOUT)
    for number, delay_ms in enumerate(DELAYS_MS):
        if delay_ms is not None:
            hosts.slow(delay_ms=max(delay_ms, 1e-6))
        first = len(read(times)) + SETTLE
        while len(read(times)) < STEPS_EACH * (number + 1):
            if run.poll() is not None:
                raise RuntimeError((folder / "output").read_text()[-2000:])
            time.sleep(0.02)
        rows.append({"delay_ms": delay_ms, **medians(read(times)[first : STEPS_EACH * (number + 1)])})
    hosts.slow()
    run.wait(120)
    return rows


def read(times: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in times.read_text().splitlines() if line.endswith("}")]


def medians(lines: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(line[key] for line in lines) for key in lines[0]}


def main() -> None:
    """Print the table, for experts spread over both hosts and for all experts on each host."""
    print("| experts | delay one way | step | in exchanges | the rest | exchanges |\n|---|---|---|---|---|---|")
    folder = Path(tempfile.mkdtemp(prefix="alfb-delays-"))
    with Hosts.up(folder / "made", 2) as hosts:
        for ep, name in ((4, "over both hosts (ep_degree 4)"), (2, "on each host (ep_degree 2)")):
            for row in measure(hosts, folder / f"ep{ep}", ep):
                delay = "bridge" if row["delay_ms"] is None else f"{row['delay_ms']:g} ms"
                step, inside = row["seconds"], row["exchange_seconds"]
                cells = (
                    name,
                    delay,
                    f"{step:.2f} s",
                    f"{inside:.2f} s",
                    f"{step - inside:.2f} s",
                    f"{row['exchanges']:.0f}",
                )
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
