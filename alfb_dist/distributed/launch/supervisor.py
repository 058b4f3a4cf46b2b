"""Run a launcher's command and watch it: signals become a save, the exit code is the ranks', no process is left."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

from alfb_dist.distributed.launch.control_channel import ControlServer
from alfb_dist.distributed.launch.signals import BAD_CONFIG, DONE, FAILED, PREEMPTED, StopSignals

GRACE_SECONDS = 10.0
"""How long processes may outlive the last rank before they are killed."""

_SSH_FAILED = 255
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans of our children become our children


def supervise(
    command: Callable[[str, bool], tuple[list[str], dict[str, str]]],
    open_channel: Callable[[], ControlServer],
    *,
    ranks: int | None,
    max_restarts: int = 0,
) -> int:
    """Run a launcher's command until the run is done, and return the run's exit code.

    A run that crashed is restarted from its newest good save, at most max_restarts times. One that was stopped or whose
    configuration is bad is not restarted.

    command: returns the launcher's command line and environment, given the control channel's address and whether to
        resume. ranks: the number of ranks that it starts, where known.
    """
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    resume = False
    with StopSignals() as signals:
        for restart in range(max_restarts + 1):
            channel = open_channel()
            try:
                code = _attempt(command(channel.address, resume), channel, signals, ranks)
            except KeyboardInterrupt:
                notify("interrupted twice: the ranks are killed, without a save")
                _kill()
                return 128 + signal.SIGINT
            finally:
                channel.close()
            resume = resume or channel.folder is not None
            if code in (DONE, PREEMPTED, BAD_CONFIG):
                return code
            notify(_describe_failure(channel, code))
            if signals.requested or restart == max_restarts:
                break
            origin = "from the newest good save" if resume else "from the start, since it had not begun"
            notify(f"restart {restart + 1} of {max_restarts}: the run continues {origin}")
    if max_restarts and not signals.requested:
        notify(f"gave up after {max_restarts} restart(s), exit code {code}; --set run.resume=true continues it by hand")
    return code


def notify(message: str) -> None:
    """Print the message on stderr."""
    print(f"alfb launch: {message}", file=sys.stderr, flush=True)


def _attempt(
    command: tuple[list[str], dict[str, str]], channel: ControlServer, signals: StopSignals, ranks: int | None
) -> int:
    """Run the launcher's command until it and every process that it started have ended; return the run's exit code.

    The command has its own session, so that a signal to our group, such as Ctrl-C, reaches only us: launchers
    kill ranks half a minute after a signal, which is too short for a large save.
    """
    words, environment = command
    launcher = subprocess.Popen(words, env=environment, start_new_session=True, stdin=subprocess.DEVNULL)
    idle_since: float | None = None
    given_up = False
    while True:
        channel.serve(0.1)
        if signals.requested and not channel.stopping:
            notify("asked to stop: the ranks save and exit")
            channel.stop()
        ended, running = launcher.poll() is not None, _descendants(launcher.pid)
        if ended:
            if channel.connected and not channel.codes and not channel.lost and not channel.stopping:
                notify("the launcher has ended: the ranks save and exit")
            channel.stop()
            if not running and not channel.connected:
                break
        if channel.connected or not (ended or channel.codes or channel.lost):
            idle_since = None
        elif idle_since is None:
            idle_since = time.monotonic()
        elif time.monotonic() - idle_since > GRACE_SECONDS:
            given_up = True
            _kill()
    reliable = not given_up and launcher.returncode != _SSH_FAILED
    return _exit_code(launcher.returncode, channel, ranks, stopped=signals.requested, launcher_reliable=reliable)


def _exit_code(
    launcher_code: int, channel: ControlServer, ranks: int | None, *, stopped: bool, launcher_reliable: bool
) -> int:
    """Return the run's exit code, from the codes of the ranks and of the launcher.

    launcher_reliable: False if its code says nothing about ranks, since ssh failed or it had to be killed.
    """
    codes = set(channel.codes.values())
    if BAD_CONFIG in codes:
        return BAD_CONFIG
    if FAILED in codes and not launcher_reliable:
        return FAILED
    if len(codes) == 1 and not channel.lost and len(channel.codes) >= (ranks or 1):
        return codes.pop()
    if stopped and not codes and not channel.lost:
        return PREEMPTED  # before any rank had begun
    return shell_code(launcher_code) or 1


def shell_code(code: int) -> int:
    """Return 128 + n for a process that signal n killed, whichever way its launcher reports that; else the code."""
    if code < 0:
        return 128 - code
    return 128 + 256 - code if code > 192 else code  # the deepspeed launcher exits with -n


def _describe_failure(channel: ControlServer, code: int) -> str:
    message = f"the run failed with exit code {code}"
    if channel.lost:
        rank, place = next(iter(channel.lost.items()))
        message += f"; rank {rank} ({place}) was the first to be lost"
    return message


def _descendants(launcher: int) -> list[psutil.Process]:
    """Return the processes below this one that still run, and reap those of our children that have ended."""
    running = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
            elif process.pid != launcher and process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
    return running


def _kill() -> None:
    """Kill every process below this one."""
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
