"""The control channel between the command that launched a run and its ranks: one TCP connection for each rank.

A rank sends one JSON object a line: who it is, where its run is kept, how it ended. A byte in the other direction, or
the end of the connection, asks the rank to stop, so that a launching command that is killed leaves no rank behind.
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
from dataclasses import dataclass
from typing import Any

CONNECT_SECONDS = 30.0
ANSWER_SECONDS = 1.0


class ControlClient:
    """A rank's end. Raises OSError if the launching command cannot be reached; without an address it does nothing."""

    def __init__(self, address: str, rank: int) -> None:
        self._socket: socket.socket | None = None
        if not address:
            return
        host, port, token = address.rsplit(":", 2)
        self._address = (host, int(port))
        self._socket = socket.create_connection(self._address, timeout=CONNECT_SECONDS)
        self._socket.settimeout(None)
        _enable_keepalive(self._socket)
        self.send(token=token, rank=rank, host=socket.gethostname(), pid=os.getpid())

    def send(self, **message: Any) -> None:
        """Send the message to the launching command, if that still runs."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendall(json.dumps(message).encode() + b"\n")

    def is_reachable(self) -> bool:
        """Return whether the launching command answers now; the connection itself notices a cut only seconds later."""
        if self._socket is None:
            return True
        try:
            socket.create_connection(self._address, timeout=ANSWER_SECONDS).close()
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close the connection, which the launching command takes for the end of the rank."""
        if self._socket is not None:
            self._socket.close()

    def on_stop(self, request: Callable[[], None]) -> None:
        """Call `request`, from a thread, once the launching command asks to stop or is gone."""

        def listen(connection: socket.socket) -> None:
            with contextlib.suppress(OSError):
                connection.recv(1)
            request()

        if self._socket is not None:
            threading.Thread(target=listen, args=(self._socket,), daemon=True).start()


@dataclass
class _Rank:
    """What is known of the rank at the other end of a connection."""

    address: str
    number: int | None = None
    place: str = ""
    unread: bytes = b""  # the beginning of a line


class ControlServer:
    """The launching command's end.

    codes: exit codes by rank. lost: where ranks ran that disconnected without one. folder: the run's directory, once
    a rank has sent it.
    """

    def __init__(self, host: str) -> None:
        """host: the name or address by which ranks reach this process."""
        local = host.startswith("127.")
        self._server = socket.create_server((host if local else "", 0), backlog=1024)
        self._token = secrets.token_hex(8)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._ranks: dict[socket.socket, _Rank] = {}
        self.address = f"{host}:{self._server.getsockname()[1]}:{self._token}"
        self.stopping = False
        self.codes: dict[int, int] = {}
        self.lost: dict[int, str] = {}
        self.folder: str | None = None

    def close(self) -> None:
        """Close all connections, which asks the ranks at their other ends to stop."""
        for connection in list(self._ranks):
            self._close(connection)
        self._selector.close()
        self._server.close()

    @property
    def connected(self) -> dict[int, str]:
        """Where each connected rank runs."""
        return {rank.number: rank.place for rank in self._ranks.values() if rank.number is not None}

    def stop(self) -> None:
        """Ask every rank to stop, and each that connects from now on."""
        if not self.stopping:
            self.stopping = True
            for connection in self._ranks:
                _request_stop(connection)

    def serve(self, seconds: float) -> None:
        """Wait at most that long for something from the ranks, and take in what has arrived."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                self._accept()
            else:
                self._read(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        connection, address = self._server.accept()
        connection.setblocking(False)
        _enable_keepalive(connection)
        self._ranks[connection] = _Rank(address[0])
        self._selector.register(connection, selectors.EVENT_READ)
        if self.stopping:
            _request_stop(connection)

    def _read(self, connection: socket.socket) -> None:
        try:
            received = connection.recv(65536)
        except OSError:
            received = b""
        rank = self._ranks[connection]
        *messages, rank.unread = (rank.unread + received).split(b"\n")
        valid = [self._handle(rank, message) for message in messages]
        if not received or not all(valid):
            self._close(connection)

    def _handle(self, rank: _Rank, line: bytes) -> bool:
        """Take in a message; return False if it is not of a rank of this run."""
        try:
            message = json.loads(line)
            if rank.number is None:
                if message["token"] != self._token:
                    return False
                rank.number = int(message["rank"])
                at = "" if rank.address.startswith("127.") else f" at {rank.address}"
                rank.place = f"{message['host']}{at}, pid {message['pid']}"
            if "folder" in message:
                self.folder = str(message["folder"])
            if "code" in message:
                self.codes[rank.number] = int(message["code"])
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def _close(self, connection: socket.socket) -> None:
        rank = self._ranks.pop(connection)
        self._selector.unregister(connection)
        connection.close()
        if rank.number is not None and rank.number not in self.codes:
            self.lost[rank.number] = rank.place


def _request_stop(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # gone: its end will be read
        connection.send(b"s")


def _enable_keepalive(connection: socket.socket) -> None:
    """End the connection some seconds after the other host is cut off, which TCP by itself would not notice."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 5), ("TCP_USER_TIMEOUT", 15_000)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
