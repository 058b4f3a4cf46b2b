"""doctor on hosts, launchers and network."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.doctor_verdicts import Row, case, check_row, put_command, verdicts

from alfb_dist.cli.doctor import hosts, launchers, network
from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.hosts import Answer, clock_skew, judge_answer, judge_pdsh
from alfb_dist.cli.doctor.network import judge_chosen, judge_interface, judge_port
from alfb_dist.cli.doctor.result import Result
from alfb_dist.distributed.network import INTERFACE_VARIABLES

ETH0 = ["lo", "eth0"]

JUDGEMENTS: list[Row] = [
    (judge_port, (29500, ""), "ok", "29500 is free"),
    (judge_port, (29500, "in use"), "warning", "--master-port"),
    (judge_interface, ("node1", "10.0.0.2", "eth0", True), "ok", "eth0, 10.0.0.2, toward node1"),
    (judge_interface, ("127.0.0.1", "127.0.0.1", "lo", False), "ok", "lo"),
    (judge_interface, ("10.0.0.1", "10.0.0.1", None, True), "problem", "no interface leads to 10.0.0.1"),
    (judge_interface, ("node1", "127.0.0.1", "lo", True), "problem", "other hosts cannot reach"),
    (judge_pdsh, (2, "/usr/bin/pdsh"), "ok", "/usr/bin/pdsh"),
    (judge_pdsh, (2, None), "problem", "apt-get install pdsh"),
    (judge_pdsh, (1, None), "not applicable", "several hosts"),
    (judge_chosen, ("GLOO_SOCKET_IFNAME", "ib0", ETH0), "problem", "there is no interface ib0"),
    (judge_chosen, ("NCCL_SOCKET_IFNAME", "=eth", ETH0), "problem", "set it to one of lo, eth0"),
    (judge_chosen, ("NCCL_SOCKET_IFNAME", "^lo,eth", ETH0), "problem", "no interface"),
]


@pytest.mark.parametrize(("judge", "facts", "verdict", "words"), JUDGEMENTS)
def test_facts_get_their_verdict(
    judge: Callable[..., Result], facts: tuple[Any, ...], verdict: str, words: str
) -> None:
    check_row(judge, facts, verdict, words)


@pytest.mark.parametrize("chosen", ["", "eth0", "lo,eth0"])
def test_existing_interface_has_no_result(chosen: str) -> None:
    assert judge_chosen("GLOO_SOCKET_IFNAME", chosen, ETH0) is None


@pytest.mark.parametrize("chosen", ["eth", "=eth0", "^lo", "^docker"])
def test_nccl_finds_interfaces_by_prefix(chosen: str) -> None:
    assert judge_chosen("NCCL_SOCKET_IFNAME", chosen, ETH0) is None


OURS = {"torch": "2.13.0", "deepspeed": "0.19.8"}
OLDER = {"torch": "2.12.0", "deepspeed": "0.19.8"}


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (Answer("a", known=OURS), {"host a": "ok"}),
        (Answer("a", error="Permission denied"), {"host a": "problem"}),
        (Answer("a", known=OLDER), {"host a": "problem"}),
        (Answer("a", known=OURS, skew=-90), {"host a": "ok", "clock of a": "warning"}),
    ],
)
def test_a_host_gets_its_verdict(answer: Answer, found: dict[str, str]) -> None:
    assert verdicts(judge_answer(answer, OURS)) == found


def test_versions_that_differ_are_named() -> None:
    (result,) = judge_answer(Answer("a", known=OLDER), OURS)
    assert result.found == "torch is '2.13.0' on this host, but '2.12.0' on a"


@pytest.mark.parametrize(("remote", "skew"), [(101.0, 0.0), (99.0, -1.0), (107.0, 4.0), (100.0, 0.0), (103.0, 0.0)])
def test_a_clock_read_between_100_and_103_is_off_by(remote: float, skew: float) -> None:
    assert clock_skew(100.0, remote, 103.0) == skew


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is first on PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


SSH = r"""
for word; do case "$word" in good|away|alone|late) host=$word;; esac; last=$word; done
case "$host" in
good) sh -c "$last";;
late) sh -c "$last" | sed 's/"clock": [0-9.]*/"clock": 1000000000.5/';;
alone) echo "no module" >&2; exit 1;;
*) echo "first line" >&2; echo "ssh: connect to host $host: No route to host" >&2; exit 255;;
esac
"""


def test_hosts_are_asked_over_ssh_in_parallel(path: Path) -> None:
    put_command(path, "ssh", SSH)
    put_command(path, "pdsh", "")
    results = list(hosts.check_hosts(Case(hosts={"good": 1, "away": 1, "alone": 1, "late": 1})))
    found = {result.check: result for result in results}
    assert found["hostfile"].verdict == found["pdsh"].verdict == found["host good"].verdict == "ok", found
    assert found["host away"].found.endswith("ssh: connect to host away: No route to host")
    assert found["host alone"].verdict == "problem" and "with alfb_dist (no module)" in found["host alone"].found
    assert found["host late"].verdict == "ok" and "behind" in found["clock of late"].found


def test_missing_hostfile_is_not_applicable_and_an_invalid_one_a_problem() -> None:
    assert verdicts(hosts.check_hosts(Case())) == {"hosts": "not applicable"}
    assert verdicts(hosts.check_hosts(Case(hostfile_error="line 2"))) == {"hostfile": "problem"}


@pytest.mark.parametrize(
    ("script", "verdict", "words"),
    [
        ("echo of 2; echo of 2", "ok", "met"),
        ("exec sleep 60", "warning", "did not end"),
        ("echo no slots >&2; exit 1", "warning", "fails: no slots"),
    ],
)
def test_mpirun_is_tried(path: Path, monkeypatch: pytest.MonkeyPatch, script: str, verdict: str, words: str) -> None:
    put_command(path, "mpirun", script)
    monkeypatch.setattr(launchers, "MPI_SECONDS", 1)
    result = list(launchers.check_launchers(Case()))[-1]
    assert result.verdict == verdict and words in result.found


def test_network_is_checked_as_the_ranks_will_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", *INTERFACE_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        assert verdicts(network.check_network(Case())) == {"master port": "warning", "interface": "ok"}
    found = network.check_network(case('run.interface="none0"', hosts={"no.such.host.invalid": 2}))
    assert verdicts(found) == {"master port": "ok", "interface": "problem", "run.interface": "problem"}
