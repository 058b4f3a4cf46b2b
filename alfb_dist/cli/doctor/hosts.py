"""The hosts of a hostfile: reached over ssh as DeepSpeed reaches them, with the same packages and the same clock."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.result import Result, not_applicable, ok, problem, warning
from alfb_dist.config.provenance import differences, facts
from alfb_dist.distributed.launch.hostfile import ssh_command
from alfb_dist.distributed.launch.preflight import SAME, ask

SSH_SECONDS = 30
SKEW_SECONDS = 2.0


@dataclass(frozen=True)
class Answer:
    """What a host said: skew is how far its clock is certainly off ours, in seconds; known are its facts."""

    host: str
    error: str = ""
    skew: float = 0.0
    known: Mapping[str, Any] | None = None


def judge_answer(answer: Answer, ours: Mapping[str, Any]) -> Iterator[Result]:
    """The verdicts on one host. ours: the facts of this one."""
    check = f"host {answer.host}"
    if answer.known is None:
        fix = f"let `ssh -o BatchMode=yes {answer.host} true` succeed (sshd, name, key, known_hosts), and {SAME}"
        yield problem(check, answer.error, fix)
        return
    if different := differences([("this host", ours), (answer.host, answer.known)], SAME):
        yield problem(check, "; ".join(line.removesuffix(f"; {SAME}") for line in different), SAME)
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


def answer_of(host: str) -> Answer:
    """What the host says over ssh, within `SSH_SECONDS`."""
    sent = time.time()
    said = ask(host, port=0, ssh=ssh_command(), timeout_seconds=SSH_SECONDS)
    received = time.time()
    if isinstance(said, str):
        return Answer(host, error=said)
    said.pop("port_error")
    return Answer(host, skew=clock_skew(sent, said.pop("clock"), received), known=said)


def check_hosts(case: Case) -> Iterator[Result]:
    """The hostfile and each of its hosts, all asked at once."""
    if case.bad_hostfile:
        yield problem("hostfile", case.bad_hostfile, 'give each host one line such as "node1 slots=8"')
    elif not case.hosts:
        yield not_applicable("hosts", "no hostfile given: --hostfile FILE")
    else:
        yield ok("hostfile", f"{len(case.hosts)} hosts, {case.world_size} ranks")
        yield judge_pdsh(len(case.hosts), shutil.which("pdsh"))
        ours = facts()
        with ThreadPoolExecutor(max_workers=64) as pool:
            for answer in pool.map(answer_of, case.hosts):
                yield from judge_answer(answer, ours)
