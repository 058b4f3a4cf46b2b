"""Signals that ask a run to stop: noted when they come, acted on between steps, agreed by all ranks."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self

DONE, PREEMPTED, BAD_CONFIG = 0, 75, 78  # exit codes of a run

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Within the context, TERM, INT and USR1 set `asked`; a second INT interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._note) for s in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
