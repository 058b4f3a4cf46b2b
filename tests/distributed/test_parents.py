"""Launchers above a process: known by name, watched for their end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import psutil
import pytest

from alfb_dist.distributed.launch.parents import launchers, watch


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["/bin/mpirun", "-n", "2"], True),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "x"], True),
        (["python", "/venv/bin/deepspeed", "x.py"], True),
        (["bash", "/home/me/deepspeed/run.sh"], False),
        (["bash", "-c", "nohup deepspeed x.py"], False),
        (["python", "train.py", "--config", "a", "deepspeed"], False),
    ],
)
def test_launchers_are_known_by_name(words: list[str], found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Above:
        def cmdline(self) -> list[str]:
            return words

    shell = Above()
    shell.cmdline = lambda: ["-bash"]  # type: ignore[method-assign]
    monkeypatch.setattr(psutil.Process, "parents", lambda _: [Above(), shell, Above()])
    assert len(launchers()) == int(found)  # none above a process that is not a launcher


def test_end_of_a_watched_process_is_seen_even_if_nobody_has_waited_for_it() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ended = threading.Event()
    watch([psutil.Process(os.getpid()), psutil.Process(process.pid)], ended.set, every_seconds=0.02)
    assert not ended.wait(0.2)
    process.kill()  # a zombie until waited for
    assert ended.wait(60)
    process.communicate()
