"""The exchange test: two processes on this machine send each other rows as ranks do, over gloo and, on GPUs, NCCL."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.device import find_device
from alfb_dist.cli.doctor.result import Result, not_applicable, ok, problem
from alfb_dist.report.wording import human

LIMIT_SECONDS = 120
_RANK = [sys.executable, "-m", "alfb_dist.cli.doctor.exchange_rank"]


def judge_exchange(backend: str, measured: dict[str, Any] | str) -> Result:
    """Judge an exchange. measured: what the two processes measured, or why they failed."""
    check = f"exchange over {backend}"
    if isinstance(measured, str):
        fix = "check the interface above, GLOO_SOCKET_IFNAME and firewalls on loopback; set NCCL_DEBUG=INFO for details"
        return problem(check, measured, fix)
    speed, latency = human(measured["bytes_per_second"]), measured["latency_seconds"] * 1e6
    found = f"2 processes: {speed}/s each way, {latency:.0f} us for one row"
    if not measured["exact"]:
        return problem(check, f"rows arrived changed; {found}", "test this machine's memory and network card")
    return ok(check, found)


def measure(environment: dict[str, str], *, rank: list[str] = _RANK, limit: float = LIMIT_SECONDS) -> Any:
    """Return what rank 0 printed as JSON, or a line with the reason that it did not. No process is left running."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {**os.environ, **environment, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        started = [
            subprocess.Popen(
                rank,
                env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
            )
            for r in range(2)
        ]
        try:
            failure = _wait(started, limit)
        finally:
            for process in started:
                process.kill()
                process.wait()
        out.seek(0), errors.seek(0)
        lines, stderr_lines = out.read().splitlines(), errors.read().strip().splitlines()
    measured = next((json.loads(line) for line in lines if line.startswith("{")), None)
    if failure or measured is None:
        return f"{failure or 'nothing was measured'}{': ' + stderr_lines[-1][:200] if stderr_lines else ''}"
    return measured


def _wait(processes: list[subprocess.Popen[bytes]], limit: float) -> str:
    """Wait until all processes end or one fails; return the failure, or an empty string."""
    deadline = time.monotonic() + limit
    while any(p.poll() is None for p in processes):
        if any(p.poll() for p in processes):
            time.sleep(1)  # for the other's error message
            break
        if time.monotonic() > deadline:
            return f"not finished within {limit:.0f} s"
        time.sleep(0.05)
    failed = [f"process {r} ended with {code}" for r, p in enumerate(processes) if (code := p.poll())]
    return ", ".join(failed)


def check_exchange(case: Case) -> Iterator[Result]:
    """Measure an exchange over gloo and, with two GPUs, over NCCL."""
    yield judge_exchange("gloo", measure({"DS_ACCELERATOR": "cpu"}))
    gpus = len(find_device().gpus)
    if gpus < 2:
        yield not_applicable("exchange over nccl", "needs two GPUs")
    else:
        yield judge_exchange("nccl", measure({"DS_ACCELERATOR": "cuda"}))
