"""A launcher's command is run and watched: signals become a save, the exit code is the ranks', nothing stays behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

from alfb_dist.distributed.launch.control_channel import Lines
from alfb_dist.distributed.launch.signals import BAD_CONFIG, DONE, FAILED, PREEMPTED, StopSignals

GRACE_SECONDS = 10.0
"""How long processes may outlive the last rank before they are killed."""

_SSH_FAILED = 255
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans of our children become our children


def supervise(
    command: Callable[[str, bool], tuple[list[str], dict[str, str]]],
    open_lines: Callable[[], Lines],
    *,
    ranks: int | None,
    max_restarts: int = 0,
) -> int:
    """The run's exit code, after as many restarts as needed and allowed.

    command: the words and the environment of the launcher's command, given the lifeline's address and whether to
    resume. ranks: how many this command starts, where known. A run that was stopped or whose configuration is bad is
    not restarted; one that crashed goes on from its newest good save.
    """
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    resume = False
    with StopSignals() as signals:
        for restart in range(max_restarts + 1):
            lines = open_lines()
            try:
                code = _attempt(command(lines.address, resume), lines, signals, ranks)
            except KeyboardInterrupt:
                say("interrupted twice: the ranks are killed, without a save")
                _kill()
                return 128 + signal.SIGINT
            finally:
                lines.close()
            resume = resume or lines.folder is not None
            if code in (DONE, PREEMPTED, BAD_CONFIG):
                return code
            say(_what_happened(lines, code))
            if signals.asked or restart == max_restarts:
                break
            way = "from the newest good save" if resume else "from the start, since it had not begun"
            say(f"restart {restart + 1} of {max_restarts}: the run goes on {way}")
    if max_restarts and not signals.asked:
        say(f"gave up after {max_restarts} restart(s), exit code {code}; --set run.resume=true goes on by hand")
    return code


def say(words: str) -> None:
    """The words stand on stderr."""
    print(f"alfb launch: {words}", file=sys.stderr, flush=True)


def _attempt(started: tuple[list[str], dict[str, str]], lines: Lines, signals: StopSignals, ranks: int | None) -> int:
    """The launcher's command and every process it started have ended: the exit code of the run.

    The command has a session of its own, so that a signal to our group, such as Ctrl-C, comes to us alone: launchers
    give ranks half a minute and then kill them, which is too short for a large save.
    """
    words, environment = started
    launcher = subprocess.Popen(words, env=environment, start_new_session=True, stdin=subprocess.DEVNULL)
    idle_since: float | None = None
    given_up = False
    while True:
        lines.serve(0.1)
        if signals.asked and not lines.stopping:
            say("asked to stop: the ranks save and leave")
            lines.stop()
        ended, left = launcher.poll() is not None, _descendants(launcher.pid)
        if ended:
            if lines.connected and not lines.codes and not lines.lost and not lines.stopping:
                say("the launcher is gone: the ranks save and leave")
            lines.stop()
            if not left and not lines.connected:
                break
        if lines.connected or not (ended or lines.codes or lines.lost):
            idle_since = None
        elif idle_since is None:
            idle_since = time.monotonic()
        elif time.monotonic() - idle_since > GRACE_SECONDS:
            given_up = True
            _kill()
    knows = not given_up and launcher.returncode != _SSH_FAILED
    return _verdict(launcher.returncode, lines, ranks, stopped=signals.asked, launcher_knows=knows)


def _verdict(launcher_code: int, lines: Lines, ranks: int | None, *, stopped: bool, launcher_knows: bool) -> int:
    """launcher_knows: its code is about ranks, not about its own end, as where ssh waits for a host that is cut off."""
    told = set(lines.codes.values())
    if BAD_CONFIG in told:
        return BAD_CONFIG
    if FAILED in told and not launcher_knows:
        return FAILED
    if len(told) == 1 and not lines.lost and len(lines.codes) >= (ranks or 1):
        return told.pop()
    if stopped and not told and not lines.lost:
        return PREEMPTED  # before any rank had begun
    return shell_code(launcher_code) or 1


def shell_code(code: int) -> int:
    """128 + n for a process that signal n killed, however its launcher puts that; else the code itself."""
    if code < 0:
        return 128 - code
    return 128 + 256 - code if code > 192 else code  # the deepspeed launcher exits with -n


def _what_happened(lines: Lines, code: int) -> str:
    words = f"the run failed with exit code {code}"
    if lines.lost:
        rank, place = next(iter(lines.lost.items()))
        words += f"; rank {rank} ({place}) was the first to be lost"
    return words


def _descendants(launcher: int) -> list[psutil.Process]:
    """The processes below this one that still run; the dead ones among our own children are taken away."""
    left = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
            elif process.pid != launcher and process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
    return left


def _kill() -> None:
    """No process below this one runs any more."""
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
