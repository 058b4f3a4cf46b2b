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
    """measured: what the two processes measured, or why they did not."""
    check = f"exchange over {backend}"
    if isinstance(measured, str):
        mend = "see the interface above; a firewall on loopback, GLOO_SOCKET_IFNAME or NCCL_DEBUG=INFO may tell more"
        return problem(check, measured, mend)
    speed, latency = human(measured["bytes_per_second"]), measured["latency_seconds"] * 1e6
    found = f"2 processes: {speed}/s each way, {latency:.0f} us for one row"
    if not measured["exact"]:
        return problem(check, f"rows came otherwise than they were sent; {found}", "test memory and network card")
    return ok(check, found)


def measure(environment: dict[str, str], *, rank: list[str] = _RANK, limit: float = LIMIT_SECONDS) -> Any:
    """What rank 0 printed as JSON, or a line that says why there is nothing. No process is left."""
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
        lines, said = out.read().splitlines(), errors.read().strip().splitlines()
    measured = next((json.loads(line) for line in lines if line.startswith("{")), None)
    if failure or measured is None:
        return f"{failure or 'nothing was measured'}{': ' + said[-1][:200] if said else ''}"
    return measured


def _wait(processes: list[subprocess.Popen[bytes]], limit: float) -> str:
    """Why the processes have not ended well, or nothing; returns once one has failed."""
    deadline = time.monotonic() + limit
    while any(p.poll() is None for p in processes):
        if any(p.poll() for p in processes):
            time.sleep(1)  # for what the other has to say
            break
        if time.monotonic() > deadline:
            return f"no end within {limit:.0f} s"
        time.sleep(0.05)
    failed = [f"process {r} ended with {code}" for r, p in enumerate(processes) if (code := p.poll())]
    return ", ".join(failed)


def check_exchange(case: Case) -> Iterator[Result]:
    """Over gloo, and over NCCL where there are two GPUs."""
    yield judge_exchange("gloo", measure({"DS_ACCELERATOR": "cpu"}))
    gpus = len(find_device().gpus)
    if gpus < 2:
        yield not_applicable("exchange over nccl", "needs two GPUs")
    else:
        yield judge_exchange("nccl", measure({"DS_ACCELERATOR": "cuda"}))
