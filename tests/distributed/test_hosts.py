"""The hosts that other tests run on: isolated from each other and this machine, gone with their maker."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hosts.cluster import Hosts
from hosts.namespaces import what_is_missing

CONNECT = """
import socket, sys, time
start = time.monotonic()
with socket.create_connection((sys.argv[1], 22), timeout=float(sys.argv[2])):
    print(time.monotonic() - start)
"""


def connect(hosts: Hosts, host: str, to: str, timeout: float = 20) -> subprocess.CompletedProcess[str]:
    return hosts.run(host, [sys.executable, "-c", CONNECT, to, str(timeout)])


def processes_of(hosts: Hosts) -> list[int]:
    holders = [*hosts.holders.values(), hosts.switch, *([hosts.relay] if hosts.relay else [])]
    return [pid for holder in holders for pid in (holder.outer, holder.inner)]


def test_hosts_reach_each_other_by_ssh_and_see_only_themselves(hosts: Hosts) -> None:
    for here, there in (("host1", "host2"), ("host2", "host1")):
        done = hosts.run(here, ["ssh", there, "hostname; hostname -I; ls /etc/ssh/authorized_keys; ls /dev/shm"])
        assert done.stdout.split() == [there, hosts.address(there), "/etc/ssh/authorized_keys"], done.stderr
    sleeper = hosts.popen("host1", ["sleep", "1000"])
    try:
        assert "sleep 1000" in hosts.processes("host1")
        assert hosts.processes("host2") == []
    finally:
        sleeper.kill()
        sleeper.wait()


def test_the_machine_itself_is_unchanged(hosts: Hosts) -> None:
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    assert not any(name in links for name in ("br0", "port1", "tap1"))
    assert not Path("/etc/ssh/authorized_keys").exists()
    assert os.uname().nodename not in hosts.names
    mounts = Path("/proc/self/mounts").read_text()
    assert str(hosts.folder) not in mounts


def test_a_pulled_cable_cuts_a_host_off_until_it_is_back(hosts: Hosts) -> None:
    hosts.link("host2", up=False)
    try:
        cut = connect(hosts, "host1", "host2", timeout=1)
        assert cut.returncode == 1 and "timed out" in cut.stderr
    finally:
        hosts.link("host2", up=True)
    assert connect(hosts, "host1", "host2").returncode == 0


def test_a_slow_cable_delays_both_ways_and_a_lossy_one_loses(hosts: Hosts) -> None:
    try:
        hosts.slow(delay_ms=50)
        assert float(connect(hosts, "host1", "host2").stdout) >= 0.1
        hosts.slow(loss=1.0)
        assert connect(hosts, "host1", "host2", timeout=1).returncode == 1
    finally:
        hosts.slow()
    assert connect(hosts, "host2", "host1").returncode == 0


@pytest.mark.usefixtures("hosts")
def test_two_sets_of_hosts_are_isolated_and_leave_nothing_when_down(tmp_path: Path, hosts: Hosts) -> None:
    with Hosts.up(tmp_path / "other", 3) as other:
        assert other.run("host3", ["ssh", "host1", "hostname"]).stdout == "host1\n"
        assert connect(hosts, "host1", other.address("host3"), timeout=1).returncode == 1
        pids = processes_of(other)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not (tmp_path / "other").exists()
    assert connect(hosts, "host1", "host2").returncode == 0


@pytest.mark.usefixtures("hosts")
def test_hosts_are_gone_when_their_maker_is_killed(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from tests.hosts.cluster import Hosts
hosts = Hosts.up(Path(sys.argv[1]), 2)
hosts.slow(delay_ms=1)
print("up", flush=True)
time.sleep(1000)
"""
    folder = tmp_path / "killed"
    root = Path(__file__).parents[2]
    maker = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=root, stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None and maker.stdout.readline() == "up\n"
    pids = processes_of(Hosts.load(folder))
    assert all(psutil.pid_exists(pid) for pid in pids)
    maker.kill()
    maker.wait()
    maker.stdout.close()
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_without_root_or_a_tool_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hosts.namespaces.os.geteuid", lambda: 1000)
    assert what_is_missing() == "hosts out of namespaces need root"
    monkeypatch.setattr("hosts.namespaces.os.geteuid", lambda: 0)
    found: Any = lambda name, path: None if name == "sshd" else "/bin/true"  # noqa: E731
    monkeypatch.setattr("hosts.namespaces.shutil.which", found)
    assert "need sshd (apt-get install" in what_is_missing()
