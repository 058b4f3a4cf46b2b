"""Requests to stop a run: noted when they come, acted on between steps, agreed by all ranks."""

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
"""An INT that follows another sooner is the same request: Ctrl-C reaches a rank directly and through its launcher."""


class StopSignals:
    """Within the context, TERM, INT and USR1 set `asked`; an INT again, some seconds later, interrupts at once.

    before_start: called instead, from any thread, for a request that comes before `start`, while there is nothing to
        save; it ends the process. Python would not get to it while the main thread waits for other ranks.
    """

    def __init__(self, before_start: Callable[[], object] | None = None) -> None:
        self.asked = False
        self._before_start = before_start
        self._interrupted_at: float | None = None
        self._handlers: dict[int, object] = {}
        self._wakeup: socket.socket | None = None
        self._old_fd = -1

    def __enter__(self) -> Self:
        self.install()
        return self

    def install(self) -> None:
        """The signals come here from now on; for the rest of the process, outside a context."""
        self._handlers = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}
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
        """From now on there is something to save."""
        self._before_start = None

    def request(self) -> None:
        """The run is asked to stop; from any thread."""
        if (end := self._before_start) is not None:
            end()
        self.asked = True

    def _note(self, number: int, _: FrameType | None) -> None:
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
