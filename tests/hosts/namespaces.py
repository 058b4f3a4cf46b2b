"""Processes that hold namespaces, and how to run something inside them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_TOOLS = ("ip", "unshare", "nsenter", "setpriv", "ssh", "sshd", "ssh-keygen", "ps")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def tool(name: str) -> str:
    """The program's path; it need not be on the user's PATH where it is an administrator's."""
    return shutil.which(name, path=_PATH) or name


def what_is_missing() -> str:
    """Why hosts cannot be made here, '' if they can."""
    if os.geteuid() != 0:
        return "hosts out of namespaces need root"
    missing = [name for name in _TOOLS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"hosts out of namespaces need {', '.join(missing)} (apt-get install iproute2 openssh-server procps)"
    tried = subprocess.run([tool("unshare"), "--net", "--pid", "--fork", "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"namespaces cannot be made here: {tried.stderr.strip()}"


@dataclass(frozen=True)
class Holder:
    """A process outside and the one inside that keeps the namespaces; started tells them from later ones' ids."""

    outer: int
    inner: int
    started: float

    @property
    def alive(self) -> bool:
        try:
            return psutil.Process(self.outer).create_time() == self.started
        except psutil.NoSuchProcess:
            return False

    def enter(self, *which: str) -> list[str]:
        """The words before a command that run it inside; all namespaces unless some are given."""
        return [tool("nsenter"), "--target", str(self.inner), *(which or ("--all",)), f"--wd={os.getcwd()}"]

    def end(self) -> None:
        """Everything inside is dead: the kernel kills a process list with its first process."""
        if not self.alive:
            return
        for pid in (self.inner, self.outer):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            os.waitpid(self.outer, 0)
        except ChildProcessError:  # made by an earlier command
            psutil.wait_procs([psutil.Process(self.outer)] if self.alive else [], timeout=10)


def hold(kinds: Sequence[str], script: str, log: Path, *, die_with_parent: bool) -> Holder:
    """A shell runs the script in new namespaces of these kinds, such as --net.

    die_with_parent: the kernel kills it when the process that calls this is gone.
    """
    bound = [tool("setpriv"), "--pdeathsig", "KILL"] if die_with_parent else []
    command = [*bound, tool("unshare"), "--fork", "--kill-child=KILL", *kinds, "sh", "-ec", script]
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env={"PATH": _PATH}
        )
    outer = psutil.Process(process.pid)
    deadline = time.monotonic() + 30
    while not (children := outer.children()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if not children:
        process.kill()
        raise RuntimeError(f"namespaces {kinds} could not be made: {log.read_text()}")
    return Holder(process.pid, children[0].pid, outer.create_time())
