"""The line between the command that launched a run and its ranks, on one host or many: one TCP connection a rank.

The rank says who it is, where the run is kept and how it ended, one JSON object a line. Anything that comes the other
way, and the end of the line too, asks the rank to stop: so a launching command that is killed leaves no rank behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any

CONNECT_SECONDS = 30.0
ANSWER_SECONDS = 1.0


class Lifeline:
    """A rank's end. OSError if the launching command cannot be reached; without an address there is none."""

    def __init__(self, address: str, rank: int) -> None:
        self._socket: socket.socket | None = None
        if not address:
            return
        host, port, token = address.rsplit(":", 2)
        self._address = (host, int(port))
        self._socket = socket.create_connection(self._address, timeout=CONNECT_SECONDS)
        self._socket.settimeout(None)
        _notice_silence(self._socket)
        self.tell(token=token, rank=rank, host=socket.gethostname(), pid=os.getpid())

    def tell(self, **message: Any) -> None:
        """The launching command has been told, if it still lives."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendall(json.dumps(message).encode() + b"\n")

    def reached(self) -> bool:
        """Whether the launching command is there now; a line by itself notices seconds later that it is cut."""
        if self._socket is None:
            return True
        try:
            socket.create_connection(self._address, timeout=ANSWER_SECONDS).close()
        except OSError:
            return False
        return True

    def close(self) -> None:
        """The line is closed, which the launching command takes for the end of the rank."""
        if self._socket is not None:
            self._socket.close()

    def on_stop(self, request: Callable[[], None]) -> None:
        """`request` will be called, from a thread, once the launching command asks to stop or is gone."""

        def listen(line: socket.socket) -> None:
            with contextlib.suppress(OSError):
                line.recv(1)
            request()

        if self._socket is not None:
            threading.Thread(target=listen, args=(self._socket,), daemon=True).start()


class Lines:
    """The launching command's end.

    connected: where each rank with an open line runs. codes: how ranks ended, by rank. lost: where ranks ran that are
    gone without having told. folder: the run's folder, once told.
    """

    def __init__(self, host: str) -> None:
        """host: the name or address by which ranks reach this process."""
        local = host.startswith("127.")
        self._server = socket.create_server((host if local else "", 0), backlog=1024)
        self._token = secrets.token_hex(8)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._open: dict[socket.socket, _Line] = {}
        self.address = f"{host}:{self._server.getsockname()[1]}:{self._token}"
        self.stopping = False
        self.codes: dict[int, int] = {}
        self.lost: dict[int, str] = {}
        self.folder: str | None = None

    def close(self) -> None:
        """No line is open; ranks that still had one are asked to stop by its end."""
        for line in list(self._open):
            self._close(line)
        self._selector.close()
        self._server.close()

    @property
    def connected(self) -> dict[int, str]:
        return {line.rank: line.place for line in self._open.values() if line.rank is not None}

    def stop(self) -> None:
        """Every rank is asked to stop, and each that comes from now on."""
        if not self.stopping:
            self.stopping = True
            for line in self._open:
                _ask(line)

    def serve(self, seconds: float) -> None:
        """What has come from the ranks is known; waits at most so long for something to come."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                line, address = self._server.accept()
                line.setblocking(False)
                _notice_silence(line)
                self._open[line] = _Line(address[0])
                self._selector.register(line, selectors.EVENT_READ)
                if self.stopping:
                    _ask(line)
            else:
                self._read(key.fileobj)  # type: ignore[arg-type]

    def _read(self, line: socket.socket) -> None:
        try:
            text = line.recv(65536)
        except OSError:
            text = b""
        state = self._open[line]
        *messages, state.rest = (state.rest + text).split(b"\n")
        for message in messages:
            if not self._take(state, message):
                text = b""
        if not text:
            self._close(line)

    def _take(self, line: _Line, text: bytes) -> bool:
        """Whether the message is one of a rank of ours."""
        try:
            message = json.loads(text)
            if line.rank is None:
                if message["token"] != self._token:
                    return False
                line.rank = int(message["rank"])
                at = "" if line.address.startswith("127.") else f" at {line.address}"
                line.place = f"{message['host']}{at}, pid {message['pid']}"
            if "folder" in message:
                self.folder = str(message["folder"])
            if "code" in message:
                self.codes[line.rank] = int(message["code"])
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def _close(self, line: socket.socket) -> None:
        state = self._open.pop(line)
        self._selector.unregister(line)
        line.close()
        if state.rank is not None and state.rank not in self.codes:
            self.lost[state.rank] = state.place


class _Line:
    def __init__(self, address: str) -> None:
        self.address = address
        self.rank: int | None = None
        self.place = ""
        self.rest = b""


def _ask(line: socket.socket) -> None:
    with contextlib.suppress(OSError):  # gone: its end will be read
        line.send(b"s")


def _notice_silence(line: socket.socket) -> None:
    """The line ends some seconds after the other host is cut off, which TCP by itself would not notice."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 5), ("TCP_USER_TIMEOUT", 15_000)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
