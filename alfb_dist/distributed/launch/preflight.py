"""What several hosts must have in common, looked at before a run starts.

The launching command asks every host over ssh; the ranks compare what they run as they meet. `python -m
alfb_dist.distributed.launch.preflight PORT` is how a host answers.
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


def ask(
    host: str,
    *,
    port: int,
    ssh: Sequence[str],
    python: str = sys.executable,
    folder: str | Path | None = None,
    timeout_seconds: float = 30,
) -> dict[str, Any] | str:
    """The host's facts, its clock and why the port is not free there; one line that says why there is no answer."""
    shared = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in shared.items())
    where = shlex.quote(str(Path(folder or ".").resolve()))
    asked = shlex.join([python, "-m", "alfb_dist.distributed.launch.preflight", str(port)])
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, int(timeout_seconds / 2))}"]
    clock = f"{CLOCK}=$(date +%s.%N)"  # read first: Python may take seconds to start
    command = [*ssh, *options, host, f"cd {where} && env {clock} {variables} {asked}"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_seconds
        )
    except subprocess.TimeoutExpired:
        return f"{host} did not answer over ssh within {timeout_seconds:g} s"
    except OSError as error:
        return f"{command[0]} cannot be run here: {error}"
    if done.returncode:
        return _why(host, done, python)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # logins may print theirs
    if not lines:
        return f"{host} answered over ssh with {done.stdout[-200:]!r}, not with its versions"
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def check_hosts(hosts: Sequence[str], *, port: int, ssh: Sequence[str] = ("ssh",), **options: Any) -> None:
    """Every host is reached and runs the same versions, and the port, where ranks will meet, is free on the first.

    port: 0 where the ranks choose one. ssh: the words before a host's name. python, folder: what the ranks will run,
    and where (here, unless given). timeout_seconds: for each host.
    ConfigError with one line for each thing wrong, naming host, values and what to do.
    """
    with ThreadPoolExecutor(max_workers=32) as pool:
        found = pool.map(lambda host: ask(host, port=port if host == hosts[0] else 0, ssh=ssh, **options), hosts)
        answers = list(zip(hosts, found))
    problems = [answer for _, answer in answers if isinstance(answer, str)]
    known = [(host, answer) for host, answer in answers if not isinstance(answer, str)]
    for host, answer in known:
        if taken := answer.pop("port_error"):
            problems.append(f"port {port} on {host} is not free ({taken}); end what uses it or choose another port")
        answer.pop("clock")
    problems += differences(known, SAME)
    if problems:
        raise ConfigError("\n".join(problems))


def _why(host: str, done: subprocess.CompletedProcess[str], python: str) -> str:
    """Why a host has not answered, in one line."""
    told = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    if done.returncode == 255:  # ssh's own failures
        return f"{host} cannot be reached over ssh without a password: {told}"
    return f"{host} cannot run {python} with alfb_dist ({told}); install the same on every host, at the same path"


def port_error(port: int) -> str:
    """Why ranks could not meet on this port of this host, '' if they could; port 0 is always free."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the ranks' store will: an ended run does not count
        try:
            s.bind(("", port))
            s.listen(1)
        except (OSError, OverflowError) as error:
            return str(error)
    return ""


def _clock() -> float:
    """This host's time in seconds, as its shell read it before it started Python."""
    try:
        return float(os.environ[CLOCK])
    except (KeyError, ValueError):
        return time.time()


if __name__ == "__main__":
    print(json.dumps({**facts(), "port_error": port_error(int(sys.argv[1])), "clock": _clock()}))
