"""Processes that hold namespaces, and commands that run inside them."""

from __future__ import annotations

import contextlib
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
    """Return the program's path, which may be in /usr/sbin or /sbin instead of on PATH."""
    return shutil.which(name, path=_PATH) or name


def what_is_missing() -> str:
    """Return why hosts cannot be made here, '' if they can."""
    if os.geteuid() != 0:
        return "hosts out of namespaces need root"
    missing = [name for name in _TOOLS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"hosts out of namespaces need {', '.join(missing)} (apt-get install iproute2 openssh-server procps)"
    tried = subprocess.run([tool("unshare"), "--net", "--pid", "--fork", "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"namespaces cannot be made here: {tried.stderr.strip()}"


@dataclass(frozen=True)
class Holder:
    """A process outside and the one inside that keeps the namespaces.

    started: when the outer one started, since ids are used again.
    """

    outer: int
    inner: int
    started: float

    @property
    def alive(self) -> bool:
        try:
            return psutil.Process(self.outer).create_time() == self.started
        except psutil.NoSuchProcess:
            return False

    def enter(self, *which: str, cwd: str | Path | None = None) -> list[str]:
        """Return the words that run a command inside when put before it, in this directory.

        which: the namespaces to enter, all if none is given. The command dies with the process that these words start,
        which itself stays outside.
        """
        words = [tool("nsenter"), "--target", str(self.inner), *(which or ("--all",)), f"--wd={cwd or os.getcwd()}"]
        return [*words, tool("setpriv"), "--pdeathsig", "KILL"]

    def end(self) -> None:
        """Kill every process inside: the kernel kills the others with the first one."""
        if not self.alive:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.inner, signal.SIGKILL)  # the outer process waits for it and ends
        try:
            os.waitpid(self.outer, 0)
        except ChildProcessError:  # made by an earlier command
            while self.alive:
                time.sleep(0.01)


def hold(kinds: Sequence[str], script: str, log: Path, *, die_with_parent: bool) -> Holder:
    """Run the script by a shell in new namespaces of these kinds, such as --net.

    die_with_parent: the kernel kills it when the calling process ends.
    """
    bound = [tool("setpriv"), "--pdeathsig", "KILL"] if die_with_parent else []
    command = [*bound, tool("unshare"), "--fork", "--kill-child=KILL", *kinds, "sh", "-ec", script]
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    pid = os.posix_spawn(command[0], command, {"PATH": _PATH}, file_actions=files, setsid=True)
    outer = psutil.Process(pid)
    deadline = time.monotonic() + 30
    while not (children := outer.children()) and os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            outer.kill()
        time.sleep(0.01)
    if not children:
        raise RuntimeError(f"namespaces {kinds} could not be made: {log.read_text()}")
    return Holder(pid, children[0].pid, outer.create_time())
