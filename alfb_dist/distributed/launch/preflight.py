"""Check before a run starts that all hosts answer and have the same versions.

The launching command runs `python -m alfb_dist.distributed.launch.preflight PORT` on every host over ssh. The ranks
compare their versions again when they meet.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from alfb_dist.config import ConfigError
from alfb_dist.config.provenance import differences, facts

CLOCK = "ALFB_CLOCK"
SAME = "install the same on every host"


def ask(host: str, *, port: int, ssh: Sequence[str], timeout_seconds: float = 30) -> dict[str, Any] | str:
    """Return the host's facts, its "clock" and its "port_error"; or one line that says why it did not answer."""
    exported = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in exported.items())
    directory = shlex.quote(str(Path.cwd()))
    question = shlex.join([sys.executable, "-m", "alfb_dist.distributed.launch.preflight", str(port)])
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, int(timeout_seconds / 2))}"]
    clock = f"{CLOCK}=$(date +%s.%N)"  # read first: Python may take seconds to start
    command = [*ssh, *options, host, f"cd {directory} && env {clock} {variables} {question}"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_seconds
        )
    except subprocess.TimeoutExpired:
        return f"{host} did not answer over ssh within {timeout_seconds:g} s"
    except OSError as error:
        return f"{command[0]} cannot be run here: {error}"
    if done.returncode:
        return _ssh_error(host, done)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # a login shell may print more
    if not lines:
        return f"{host} answered over ssh with {done.stdout[-200:]!r}, not with its versions"
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def check_hosts(hosts: Sequence[str], *, port: int, ssh: Sequence[str], timeout_seconds: float = 30) -> None:
    """Check that every host answers with the same versions, and that the port is free on the first host.

    port: where the ranks will meet, 0 if they choose one. ssh: the command up to a host's name.
    timeout_seconds: for each host.
    Raises ConfigError with a line for each problem, naming host, values and what to do.
    """
    with ThreadPoolExecutor(max_workers=32) as pool:
        ports = [port, *[0] * (len(hosts) - 1)]
        answers = list(
            pool.map(lambda host, port: ask(host, port=port, ssh=ssh, timeout_seconds=timeout_seconds), hosts, ports)
        )
    problems = [answer for answer in answers if isinstance(answer, str)]
    known = [(host, answer) for host, answer in zip(hosts, answers) if not isinstance(answer, str)]
    for host, answer in known:
        if error := answer.pop("port_error"):
            problems.append(f"port {port} on {host} is not free ({error}); end what uses it or choose another port")
        answer.pop("clock")
    problems += differences(known, SAME)
    if problems:
        raise ConfigError("\n".join(problems))


def _ssh_error(host: str, done: subprocess.CompletedProcess[str]) -> str:
    """Return why a host has not answered, in one line."""
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    if done.returncode == 255:  # ssh's own failures
        return f"{host} cannot be reached over ssh without a password: {reason}"
    return f"{host} cannot run {sys.executable} with alfb_dist ({reason}); {SAME}, at the same path"


def port_error(port: int) -> str:
    """Return why ranks cannot meet on this port of this host, '' if they can; port 0 is always free."""
    with socket.socket() as s:
        # As the ranks' store does: a port of an ended run is free.
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
            s.listen(1)
        except (OSError, OverflowError) as error:
            return str(error)
    return ""


def _clock() -> float:
    """Return this host's time in seconds, which its shell read before it started Python."""
    try:
        return float(os.environ[CLOCK])
    except (KeyError, ValueError):
        return time.time()


if __name__ == "__main__":
    print(json.dumps({**facts(), "port_error": port_error(int(sys.argv[1])), "clock": _clock()}))
