"""Containers of a built image as an engine would start them, by buildah, unshare and chroot: no engine is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# In a new mount, host name and process namespace. Waits for a line, so that a network can be laid before.
_START = """
set -e
root=$1 hosts=$2 user=$3 name=$4; shift 4
hostname "$name"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --bind "$hosts" "$root/etc/hosts"
read -r _
exec chroot --userspec="$user" "$root" "$@" < /dev/null
"""


@dataclass(frozen=True)
class Container:
    """The folder in which the image's files lie, and what the image says about how it is run."""

    root: Path
    config: dict[str, Any]

    @property
    def home(self) -> Path:
        """The working folder, seen from here."""
        return self.root / self.config["WorkingDir"].lstrip("/")

    def start(
        self, words: list[str], hosts: Path, *, name: str = "node0", network: bool = False, entry: bool = True
    ) -> subprocess.Popen[str]:
        """A process that has the command as its only child, process 1 of its own, once `go` is called.

        entry: behind the image's entry point. hosts: its /etc/hosts. network: one of its own, with nothing in it.
        """
        environment = [*self.config["Env"], "HOME=/home/alfb", "OMP_NUM_THREADS=1", "WANDB_MODE=disabled"]
        inside = ["env", "--ignore-environment", f"--chdir={self.config['WorkingDir']}", *environment]
        inside += [*(self.config["Entrypoint"] if entry else []), *words]
        spaces = ["--mount", "--pid", "--uts", "--ipc", *(["--net"] if network else [])]
        command = ["unshare", *spaces, "--fork", "--kill-child", "sh", "-c", _START, "start"]
        command += [str(self.root), str(hosts), self.config["User"], name, *inside]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, words: list[str], hosts: Path, *, entry: bool = True) -> tuple[int, str]:
        """The command's exit code and what it printed."""
        process = self.start(words, hosts, entry=entry)
        output, _ = process.communicate("go\n", timeout=170)
        return process.returncode, output


def go(process: subprocess.Popen[str]) -> None:
    """The container's command starts."""
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def first_process(process: subprocess.Popen[str]) -> psutil.Process:
    """The container's process 1."""
    wait_for(lambda: psutil.Process(process.pid).children(), process)
    return psutil.Process(process.pid).children()[0]


def join_network(processes: list[subprocess.Popen[str]], addresses: list[str]) -> None:
    """Two containers with a network of their own are joined by a cable, and nothing else."""
    pids = [str(first_process(p).pid) for p in processes]
    for pid in pids:  # its namespaces are there once it has its host name
        wait_for(lambda pid=pid: os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net"), processes[0])
    cable = ["ip", "link", "add", "eth0", "netns", pids[0], "type", "veth", "peer", "name", "eth0", "netns", pids[1]]
    subprocess.run(cable, check=True)
    for pid, address in zip(pids, addresses):
        for words in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            subprocess.run(["nsenter", "--target", pid, "--net", "ip", *words], check=True)
        subprocess.run(["nsenter", "--target", pid, "--net", "ip", "link", "set", "lo", "up"], check=True)


def wait_for(there: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 150) -> None:
    """`there` has become true while the process ran; AssertionError with what it printed otherwise."""
    deadline = time.monotonic() + seconds
    while not there():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"ended or late: {process.communicate()[0]}")
        time.sleep(0.1)


@contextmanager
def container(image: str) -> Iterator[Container]:
    """A container of the image, gone afterwards."""
    environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}

    def buildah(*words: str) -> str:
        command = [shutil.which("buildah") or "buildah", *words]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    name = buildah("from", "--pull-never", image)
    try:
        config = json.loads(buildah("inspect", name))["OCIv1"]["config"]
        yield Container(Path(buildah("mount", name)), config)
    finally:
        buildah("rm", name)
