"""Requests to stop: which signals, when they count, and what happens before there is anything to save."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from alfb_dist.distributed.launch import signals as signals_module
from alfb_dist.distributed.launch.signals import STOP_SIGNALS, StopSignals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_requests_a_stop_and_the_old_handler_is_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
    assert signal.getsignal(number) is before


def test_second_interrupt_counts_only_after_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(signals_module.time, "monotonic", lambda: now)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # Ctrl-C by way of the launcher
        assert stop.requested
        now = 104.0
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_request_from_a_thread_ends_the_process_before_the_start_and_is_recorded_after_it() -> None:
    ended = []
    with StopSignals(before_start=lambda: ended.append(True)) as stop:
        threading.Thread(target=stop.request).start()
        deadline = time.monotonic() + 30
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)
        stop.start()
        stop.requested, count = False, len(ended)
        stop.request()
        assert stop.requested and len(ended) == count


BLOCKED = """
import ctypes, os
from alfb_dist.distributed.launch.signals import StopSignals
StopSignals(before_start=lambda: os._exit(75)).install()
mutex = ctypes.create_string_buffer(256)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
print("ready", flush=True)
lock(mutex)  # blocks for ever, where no Python handler runs, as in a collective
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_the_start_a_signal_ends_a_process_whose_main_thread_is_blocked(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(60) == 75
    finally:
        process.kill()
        process.communicate()
