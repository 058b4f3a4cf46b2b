"""alfb launch with launchers and ranks that end, crash, are stopped or killed; the ranks run without torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from support.launch_fakes import RANKS

from alfb_dist.distributed.launch.control_channel import ControlClient, ControlServer
from alfb_dist.distributed.launch.supervisor import shell_code

FAKES = Path(__file__).parents[1] / "support" / "launch_fakes.py"


class Play:
    """A supervised play in its own processes, found by a marker in their environment."""

    def __init__(self, play: str, max_restarts: int = 0) -> None:
        self.marker = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, str(FAKES), play, str(max_restarts)],
            env={**os.environ, "ALFB_TEST_MARKER": self.marker},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def orphans(self) -> list[int]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("ALFB_TEST_MARKER") == self.marker and process.status() != "zombie":
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def until_ranks(self) -> str:
        """Wait until the ranks are there, and return what was printed up to then."""
        assert self.process.stdout
        lines = []
        while sum(line.count("resume=") for line in lines) < RANKS:  # two ranks may share a line
            lines.append(self.process.stdout.readline())
            assert lines[-1], "".join(lines)
        return "".join(lines)

    def end(self) -> tuple[int, str]:
        """Wait for the end of all processes of the play, and return (exit code, what was still printed)."""
        out, _ = self.process.communicate(timeout=60)
        deadline = time.monotonic() + 30
        while self.orphans():
            assert time.monotonic() < deadline, f"orphans {self.orphans()}\n{out}"
            time.sleep(0.05)
        code = self.process.returncode
        return 128 - code if code < 0 else code, out


@pytest.mark.parametrize(
    ("play", "code"),
    [
        ("done", 0),
        ("bad configuration", 78),
        ("launcher is killed", 75),
        ("crash", 137),
        ("disagree", 75),  # the launcher's own code, since the ranks give no common one
        ("launcher knows nothing", 1),  # an end without a code from any rank is no success
        ("launcher leaves a process behind", 0),
        ("host is cut off", 1),  # not 137, of the launcher that had to be killed
    ],
)
def test_exit_code_is_the_ranks_and_no_process_is_left(play: str, code: int) -> None:
    assert Play(play).end()[0] == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("target", ["command", "group"])
def test_a_signal_asks_the_ranks_to_stop(number: signal.Signals, target: str) -> None:
    play = Play("wait")
    play.until_ranks()
    (os.kill if target == "command" else os.killpg)(play.process.pid, number)
    assert play.end()[0] == 75


def test_killed_command_leaves_no_rank() -> None:
    play = Play("wait")
    play.until_ranks()
    play.process.kill()
    assert play.end()[0] == 137


def test_second_interrupt_some_seconds_later_kills_ranks_that_do_not_respond() -> None:
    play = Play("deaf")
    play.until_ranks()
    play.process.send_signal(signal.SIGINT)
    time.sleep(3.2)
    play.process.send_signal(signal.SIGINT)
    code, out = play.end()
    assert code == 130
    assert "killed, without a save" in out


def test_crash_is_resumed_once_the_run_has_a_directory() -> None:
    code, out = Play("crash once", 3).end()
    assert code == 0
    assert out.count("restart ") == 1
    assert "restart 1 of 3: the run continues from the newest good save" in out
    assert "rank 1 (" in out and "was the first to be lost" in out
    assert out.count("resume=True") == RANKS


def test_crash_before_the_run_has_a_directory_starts_it_anew() -> None:
    code, out = Play("crash before the start", 1).end()
    assert code == 137
    assert "resume=True" not in out
    assert "from the start, since it had not begun" in out


def test_it_gives_up_after_max_restarts() -> None:
    code, out = Play("crash", 2).end()
    assert code == 137
    assert [f"restart {n} of 2" in out for n in (1, 2, 3)] == [True, True, False]
    assert "gave up after 2 restart(s), exit code 137" in out


@pytest.mark.parametrize(("play", "code"), [("bad configuration", 78), ("done", 0)])
def test_only_a_crash_is_restarted(play: str, code: int) -> None:
    found, out = Play(play, 5).end()
    assert found == code
    assert "restart" not in out


def test_preempted_run_is_not_restarted() -> None:
    play = Play("wait", 5)
    out = play.until_ranks()
    play.process.terminate()
    code, rest = play.end()
    assert code == 75
    assert "restart" not in out + rest


@pytest.mark.parametrize(
    ("given", "code"), [(0, 0), (75, 75), (-9, 137), (-15, 143), (247, 137), (241, 143), (137, 137)]
)
def test_death_by_signal_is_128_and_its_number(given: int, code: int) -> None:
    assert shell_code(given) == code


# The control channel.


def test_messages_without_the_token_are_ignored() -> None:
    server = ControlServer("127.0.0.1")
    host, port, token = server.address.rsplit(":", 2)
    stranger = ControlClient(f"{host}:{port}:{'0' * len(token)}", 0)
    stranger.send(code=0)  # the right port, another token
    with socket.create_connection((host, int(port))) as noise:
        noise.sendall(b"GET / HTTP/1.1\r\n\r\n")
        for _ in range(5):
            server.serve(0.05)
        assert not server.codes and not server.connected and not server.lost
    stranger.close()
    server.close()


def test_a_rank_sees_whether_the_command_is_reachable() -> None:
    assert ControlClient("", 0).is_reachable()  # without an address there is nothing to reach
    server = ControlServer("127.0.0.1")
    rank = ControlClient(server.address, 0)
    assert rank.is_reachable()
    server.close()
    assert not rank.is_reachable()
    rank.close()


def test_rank_that_connects_late_is_asked_to_stop_at_once() -> None:
    server, stopped = ControlServer("127.0.0.1"), []
    server.stop()
    rank = ControlClient(server.address, 5)
    rank.on_stop(lambda: stopped.append(True))
    deadline = time.monotonic() + 30
    while not (stopped and server.connected) and time.monotonic() < deadline:
        server.serve(0.05)
    assert stopped and list(server.connected) == [5]
    rank.close()
    server.close()
