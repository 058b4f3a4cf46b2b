"""Test hosts: made, connected, run on, cut off, slowed down, removed."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from .namespaces import Holder, hold, tool
from .ssh_files import write_ssh_files

_NETWORK = "10.77.0"  # only seen by the hosts of one bridge
# A host's first process sets its name, network and files; then it is sshd, which also reaps orphans.
_HOST = """
echo {name} > /proc/sys/kernel/hostname
ip link set lo up
mount --make-rprivate /
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/sshd
mount --bind {folder}/etc-hosts /etc/hosts
mount --bind {folder}/ssh /etc/ssh
exec {sshd} -D -e
"""


class Hosts:
    """Hosts by name, each with an address and the process that holds it; `switch` holds the bridge between them."""

    def __init__(self, folder: Path, switch: Holder, *, die_with_parent: bool) -> None:
        self.folder, self.switch, self.die_with_parent = folder, switch, die_with_parent
        self.holders: dict[str, Holder] = {}
        self.relay: Holder | None = None

    @classmethod
    def up(cls, folder: Path, count: int, *, die_with_parent: bool = True) -> Self:
        """Make host1, host2, ..., which reach each other by ssh, with their files in `folder`, which must not exist."""
        folder = folder.resolve()
        folder.mkdir(parents=True, mode=0o700)
        write_ssh_files(folder / "ssh")
        lines = [f"{address_of(i)} host{i}" for i in range(1, count + 1)]
        (folder / "etc-hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        log = folder / "log"
        switch = hold(["--net"], "exec sleep infinity", log, die_with_parent=die_with_parent)
        hosts = cls(folder, switch, die_with_parent=die_with_parent)
        try:
            hosts._add_bridge(0)
            for i in range(1, count + 1):
                hosts._add(f"host{i}", i)
            hosts._wait_for_ssh()
        except BaseException:
            hosts.down()
            raise
        hosts.save()
        return hosts

    def _add_bridge(self, number: int) -> None:
        self._ip(self.switch, f"link add br{number} type bridge forward_delay 0")
        self._ip(self.switch, f"link set br{number} up")

    def _add(self, name: str, number: int) -> None:
        kinds = ["--net", "--uts", "--ipc", "--mount", "--pid", "--mount-proc"]
        script = _HOST.format(name=name, folder=self.folder, sshd=tool("sshd"))
        host = hold(kinds, script, self.folder / "log", die_with_parent=self.die_with_parent)
        self.holders[name], port = host, f"port{number}"
        self._add_bridge(number)  # for a slow link; the plain one is attached to br0
        self._ip(self.switch, f"link add {port} type veth peer name eth0 netns {host.inner}")
        self._ip(self.switch, f"link set {port} up master br0")
        self._ip(host, f"address add {address_of(number)}/24 dev eth0")
        self._ip(host, "link set eth0 up")

    def _ip(self, holder: Holder, words: str) -> None:
        deadline = time.monotonic() + 10
        while True:
            command = [*holder.enter("--net"), tool("ip"), *words.split()]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return
            if time.monotonic() > deadline or not holder.alive:
                raise RuntimeError(f"ip {words}: {done.stderr.strip()} {(self.folder / 'log').read_text()}")
            time.sleep(0.05)  # the process inside has not started yet

    def _wait_for_ssh(self) -> None:
        first, deadline = next(iter(self.holders)), time.monotonic() + 30
        for name in self.holders:
            while (done := self.run(first, ["ssh", name, "true"])).returncode:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{name} has no sshd: {done.stderr} {(self.folder / 'log').read_text()}")
                time.sleep(0.1)

    def save(self) -> None:
        """Write what `load` needs into the directory."""
        holders = {name: asdict(holder) for name, holder in self.holders.items()}
        relay = asdict(self.relay) if self.relay else None
        state = {"switch": asdict(self.switch), "hosts": holders, "relay": relay}
        (self.folder / "hosts.json").write_text(json.dumps(state))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return the hosts that `up` made in the directory. Raises FileNotFoundError if there are none."""
        state = json.loads((folder / "hosts.json").read_text())
        hosts = cls(folder.resolve(), Holder(**state["switch"]), die_with_parent=False)
        hosts.holders = {name: Holder(**holder) for name, holder in state["hosts"].items()}
        hosts.relay = Holder(**state["relay"]) if state["relay"] else None
        return hosts

    def down(self) -> None:
        """Remove every process, namespace and file of the hosts."""
        for holder in (*self.holders.values(), *([self.relay] if self.relay else []), self.switch):
            holder.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @property
    def names(self) -> list[str]:
        return list(self.holders)

    def address(self, host: str) -> str:
        return address_of(int(host.removeprefix("host")))

    def popen(self, host: str, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start the command on the host."""
        inside = self.holders[host].enter(cwd=options.pop("cwd", None))
        return subprocess.Popen([*inside, *command], text=True, **options)

    def run(self, host: str, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the command on the host and capture its output."""
        given = {"capture_output": True, "text": True, "check": False, "timeout": 300, **options}
        inside = self.holders[host].enter(cwd=given.pop("cwd", None))
        return subprocess.run([*inside, *command], **given)

    def processes(self, host: str) -> list[str]:
        """Return the command lines of the host's processes, except sshd's and this ps."""
        lines = self.run(host, [tool("ps"), "-eo", "pid=,stat=,args="]).stdout.splitlines()
        kept = [line.split(maxsplit=2) for line in lines]
        own = ("sshd", "/usr/sbin/sshd", tool("sshd"), tool("ps"))
        return [args for _, stat, args in kept if not args.startswith(own) and not stat.startswith("Z")]

    def link(self, host: str, *, up: bool) -> None:
        """Connect the host to the others, or cut it off."""
        self._ip(self.switch, f"link set port{host.removeprefix('host')} {'up' if up else 'down'}")

    def slow(self, *, delay_ms: float = 0, loss: float = 0) -> None:
        """Delay frames between hosts, one way, and lose this fraction of them; 0 and 0 is the plain bridge."""
        if self.relay:
            self.relay.end()
            self.relay = None
        numbers = range(1, len(self.holders) + 1)
        if delay_ms or loss:
            words = [sys.executable, str(Path(__file__).with_name("slow_link.py")), str(delay_ms), str(loss)]
            script = shlex.join([*self.switch.enter("--net"), *words, *(f"tap{n}" for n in numbers)])
            self.relay = hold(["--pid"], f"exec {script}", self.folder / "log", die_with_parent=self.die_with_parent)
            for n in numbers:
                self._ip(self.switch, f"link set tap{n} up master br{n}")
        for n in numbers:
            self._ip(self.switch, f"link set port{n} master br{n if self.relay else 0}")
        self.save()


def address_of(number: int) -> str:
    """Return the address of the host with this number, from 1."""
    return f"{_NETWORK}.{number}"
