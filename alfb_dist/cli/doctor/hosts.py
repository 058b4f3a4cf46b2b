"""The hosts of a hostfile: reachable over ssh as from DeepSpeed, with the same packages and clock."""

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
    """The answer of a host. skew: the least difference of its clock from ours, in seconds. known: its facts."""

    host: str
    error: str = ""
    skew: float = 0.0
    known: Mapping[str, Any] | None = None


def judge_answer(answer: Answer, ours: Mapping[str, Any]) -> Iterator[Result]:
    """Judge the answer of a host. ours: the facts of this host."""
    check = f"host {answer.host}"
    if answer.known is None:
        fix = f"make `ssh -o BatchMode=yes {answer.host} true` work (sshd, name, key, known_hosts), and {SAME}"
        yield problem(check, answer.error, fix)
        return
    if different := differences([("this host", ours), (answer.host, answer.known)], SAME):
        yield problem(check, "; ".join(line.removesuffix(f"; {SAME}") for line in different), SAME)
    else:
        yield ok(check, "reachable; same packages as this host")
    if abs(answer.skew) > SKEW_SECONDS:
        found = f"{abs(answer.skew):.1f} s {'ahead' if answer.skew > 0 else 'behind'}"
        yield warning(f"clock of {answer.host}", found, "synchronize the hosts' clocks with NTP (chrony)")


def judge_pdsh(hosts: int, path: str | None) -> Result:
    """Judge whether pdsh, which DeepSpeed uses to reach other hosts, is installed."""
    if hosts < 2:
        return not_applicable("pdsh", "needed for several hosts only")
    if path is None:
        return problem("pdsh", "not on PATH", "apt-get install pdsh, or launch --with openmpi")
    return ok("pdsh", path)


def clock_skew(sent: float, remote: float, received: float) -> float:
    """Return the least difference of a clock read between `sent` and `received`; 0 if it may be right."""
    return min(0.0, remote - sent) or max(0.0, remote - received)


def answer_of(host: str) -> Answer:
    """Ask a host over ssh, for at most `SSH_SECONDS`."""
    sent = time.time()
    answer = ask(host, port=0, ssh=ssh_command(), timeout_seconds=SSH_SECONDS)
    received = time.time()
    if isinstance(answer, str):
        return Answer(host, error=answer)
    answer.pop("port_error")
    return Answer(host, skew=clock_skew(sent, answer.pop("clock"), received), known=answer)


def check_hosts(case: Case) -> Iterator[Result]:
    """Check the hostfile and its hosts, all in parallel."""
    if case.hostfile_error:
        yield problem("hostfile", case.hostfile_error, 'give each host one line such as "node1 slots=8"')
    elif not case.hosts:
        yield not_applicable("hosts", "no hostfile given (--hostfile FILE)")
    else:
        yield ok("hostfile", f"{len(case.hosts)} hosts, {case.world_size} ranks")
        yield judge_pdsh(len(case.hosts), shutil.which("pdsh"))
        ours = facts()
        with ThreadPoolExecutor(max_workers=64) as pool:
            for answer in pool.map(answer_of, case.hosts):
                yield from judge_answer(answer, ours)
