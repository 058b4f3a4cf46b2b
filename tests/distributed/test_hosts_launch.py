"""Two hosts of two ranks: every launcher gives the run of one host, to the last bit; the tutorial runs as printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hosts.campaign import finished
from hosts.cluster import Hosts
from hosts.runs import environment, metrics, same_runs
from hosts.tutorial import TUTORIAL, commands


def test_only_shell_blocks_are_commands() -> None:
    document = "text\n```sh\nfirst\nsecond\n```\n    indented\n```python\nnot this\n```\n```sh\nthird\n```\n"
    assert commands(document) == "set -eux\nfirst\nsecond\nthird\n"


@pytest.mark.hosts
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ep_degree", [4, 2], ids=["ep4", "ep2x2"])
def test_two_hosts_give_the_run_of_one(hosts: Hosts, tmp_path: Path, ep_degree: int) -> None:
    one = finished(hosts, tmp_path, "one", ep_degree, spread=False)
    for launcher in ("deepspeed", "mpirun"):
        two = finished(hosts, tmp_path, launcher, ep_degree, "--with", launcher)
        assert same_runs(one, two) == []
    assert [hosts.processes(host) for host in hosts.names] == [[], []]


@pytest.mark.hosts
@pytest.mark.timeout(900)
def test_the_tutorial_runs_as_printed(hosts: Hosts, tmp_path: Path) -> None:
    script = commands(TUTORIAL.read_text())
    assert script.count("alfb launch") == 5
    done = hosts.run("host1", ["bash", "-c", script], cwd=tmp_path, env=environment(), timeout=880)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "the same 7 lines of metrics on one host and on two" in done.stdout
    runs = tmp_path / "runs"
    assert same_runs(runs / "one-host", runs / "two-hosts")[0].startswith("7 and 10 lines")  # which continues
    assert len(metrics(runs / "replicas")) == 7
    assert (runs / "two-hosts" / "report.html").is_file()
    assert [hosts.processes(host) for host in hosts.names] == [[], []]
