"""The launchers above a rank on its host, which are found by name and watched."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

_LAUNCHERS = {"deepspeed", "deepspeed.launcher.launch", "deepspeed.launcher.runner", "torchrun"}
_LAUNCHERS |= {"torch.distributed.run", "torch.distributed.launch", "mpirun", "mpiexec", "prterun", "prted"}


def launchers() -> list[psutil.Process]:
    """Return the launcher processes above this one on its host, from the parent upward."""
    found = []
    for process in psutil.Process().parents():
        try:
            names = {Path(word).name for word in process.cmdline()[:4]}
        except psutil.Error:
            break
        if not names & _LAUNCHERS:
            break
        found.append(process)
    return found


def watch(processes: list[psutil.Process], on_end: Callable[[], None], *, every_seconds: float = 0.5) -> None:
    """Call `on_end` once, from a thread, when the first of the processes has ended."""

    def has_ended(process: psutil.Process) -> bool:
        try:
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def poll() -> None:
        while not any(has_ended(process) for process in processes):
            time.sleep(every_seconds)
        on_end()

    if processes:
        threading.Thread(target=poll, daemon=True).start()
