"""Requests to stop a run: recorded when they arrive, acted on between steps by all ranks together."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

DONE, FAILED, PREEMPTED, BAD_CONFIG = 0, 1, 75, 78  # exit codes of a run

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PATIENCE_SECONDS = 3.0
"""A second INT within this time is the same request: Ctrl-C reaches a rank directly and through its launcher."""


class StopSignals:
    """Context in which TERM, INT and USR1 set `requested`; another INT, some seconds later, interrupts at once.

    before_start: called instead, from any thread, for a request before `start`, while there is nothing to save; it ends
        the process. A Python signal handler would not run while the main thread waits for other ranks.
    """

    def __init__(self, before_start: Callable[[], object] | None = None) -> None:
        self.requested = False
        self._before_start = before_start
        self._interrupted_at: float | None = None
        self._handlers: dict[int, object] = {}
        self._wakeup: socket.socket | None = None
        self._old_fd = -1

    def __enter__(self) -> Self:
        self.install()
        return self

    def install(self) -> None:
        """Handle the signals from now on; outside a context, for the rest of the process."""
        self._handlers = {s: signal.signal(s, self._handle) for s in STOP_SIGNALS}
        if self._before_start is not None:
            read, self._wakeup = socket.socketpair()
            self._wakeup.setblocking(False)
            self._old_fd = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._wake, args=(read,), daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._old_fd)
            self._wakeup.close()
        for s, handler in self._handlers.items():
            signal.signal(s, handler)  # type: ignore[arg-type]

    def start(self) -> None:
        """Declare that from now on there is something to save."""
        self._before_start = None

    def request(self) -> None:
        """Ask the run to stop; from any thread."""
        if (end := self._before_start) is not None:
            end()
        self.requested = True

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._interrupted_at is not None:
            if now - self._interrupted_at > PATIENCE_SECONDS:
                raise KeyboardInterrupt
        elif number == signal.SIGINT:
            self._interrupted_at = now
        self.request()

    def _wake(self, read: socket.socket) -> None:
        with read:
            while numbers := read.recv(64):
                if any(number in STOP_SIGNALS for number in numbers):
                    self.request()
