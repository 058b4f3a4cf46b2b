"""The hosts of a hostfile: reached over ssh as DeepSpeed reaches them, with the same packages and the same clock."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata

from alfb_dist.doctor.case import Case
from alfb_dist.doctor.result import Result, not_applicable, ok, problem, warning

SSH_SECONDS = 10
SKEW_SECONDS = 2.0
PACKAGES = ("alfb_dist", "torch", "deepspeed", "transformers")
_PROGRAM = "import sys; from importlib.metadata import version as v; print('has', *map(v, sys.argv[1:]))"


@dataclass(frozen=True)
class Answer:
    """What a host said: skew is how far its clock is certainly off ours, in seconds; versions are its packages'."""

    host: str
    error: str = ""
    skew: float = 0.0
    versions: tuple[str, ...] | None = None


def judge_answer(answer: Answer, ours: tuple[str, ...]) -> Iterator[Result]:
    """The verdicts on one host. ours: the versions of `PACKAGES` here."""
    check = f"host {answer.host}"
    if answer.error:
        mend = f"let `ssh -o BatchMode=yes {answer.host} true` succeed: sshd, name, key, known_hosts"
        yield problem(check, f"ssh: {answer.error}", mend)
        return
    if answer.versions is None:
        found = f"reached, but {sys.executable} in {os.getcwd()} has no alfb_dist there"
        yield problem(check, found, "install the same environment under the same path on every host, or share it")
    elif answer.versions != ours:
        pairs = zip(PACKAGES, answer.versions, ours)
        different = ", ".join(f"{name} {theirs} (here {here})" for name, theirs, here in pairs if theirs != here)
        yield problem(check, different, "install the same versions on every host")
    else:
        yield ok(check, "reached; same packages as here")
    if abs(answer.skew) > SKEW_SECONDS:
        found = f"{abs(answer.skew):.1f} s {'ahead' if answer.skew > 0 else 'behind'}"
        yield warning(f"clock of {answer.host}", found, "keep the hosts' clocks with NTP (chrony)")


def judge_pdsh(hosts: int, path: str | None) -> Result:
    """Whether DeepSpeed's usual way to other hosts is there."""
    if hosts < 2:
        return not_applicable("pdsh", "for several hosts only")
    if path is None:
        return problem("pdsh", "not on PATH", "apt-get install pdsh, or deepspeed --launcher openmpi")
    return ok("pdsh", path)


def clock_skew(sent: float, remote: float, received: float) -> float:
    """How far a clock that was read between `sent` and `received` is certainly off; 0 if it may be right."""
    return min(0.0, remote - sent) or max(0.0, remote - received)


def ask(host: str) -> Answer:
    """The host's answer over ssh, within `SSH_SECONDS` for the connection and as many for the rest."""
    python = shlex.join([sys.executable, "-c", _PROGRAM, *PACKAGES])
    remote = f"date +%s.%N; cd {shlex.quote(os.getcwd())} && {python}"
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}"]
    command = ["ssh", *options, *shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")), host, remote]
    sent = time.time()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=2 * SSH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Answer(host, error=f"no answer within {2 * SSH_SECONDS} s")
    except OSError as error:
        return Answer(host, error=str(error))
    received, lines = time.time(), done.stdout.splitlines()
    try:
        clock = float(lines[0])
    except (IndexError, ValueError):
        return Answer(host, error=(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200])
    has = next((line.split()[1:] for line in lines if line.startswith("has ")), None)
    return Answer(host, skew=clock_skew(sent, clock, received), versions=None if has is None else tuple(has))


def check_hosts(case: Case) -> Iterator[Result]:
    """The hostfile and each of its hosts, all asked at once."""
    if case.bad_hostfile:
        yield problem("hostfile", case.bad_hostfile, 'give each host one line such as "node1 slots=8"')
    elif not case.hosts:
        yield not_applicable("hosts", "no hostfile given: --hostfile FILE")
    else:
        yield ok("hostfile", f"{len(case.hosts)} hosts, {case.world_size} ranks")
        yield judge_pdsh(len(case.hosts), shutil.which("pdsh"))
        ours = tuple(metadata.version(name) for name in PACKAGES)
        with ThreadPoolExecutor(max_workers=64) as pool:
            for answer in pool.map(ask, case.hosts):
                yield from judge_answer(answer, ours)
