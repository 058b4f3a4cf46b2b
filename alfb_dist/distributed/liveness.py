"""Every rank answers questions about itself, so that a failed exchange can name the rank that is missing.

A rank listens on its own port and reports its position: its step and the function that it is in. A rank whose exchange
fails asks all others, and names those that do not answer, those that are somewhere else, or the failure that another
rank has reported. Nothing is sent while no rank fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from alfb_dist.distributed.network import own_address

ANSWER_SECONDS = 1.0
LINGER_SECONDS = 1.0  # how long a failed rank still answers; else others would take it for the first that failed
# Files whose functions wait for other ranks.
_WAITING = ("distributed_c10d.py", "memory_transport.py", "collectives.py")
_PACKAGE = str(Path(__file__).parents[1])


class PeerError(RuntimeError):
    """A failed exchange with other ranks; the message names step, operation and the ranks to look at."""


@dataclass(frozen=True)
class Peer:
    """A rank as others see it. address: where it answers."""

    rank: int
    host: str
    pid: int
    address: tuple[str, int]

    @property
    def place(self) -> str:
        """The host's name, and its address unless that is a local one: hosts may share a name."""
        address = self.address[0]
        return self.host if address.startswith("127.") else f"{self.host} at {address}"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.place} (pid {self.pid})"


class Peers:
    """This rank among the others: it answers their questions and asks its own.

    me: this rank, which the others must know. step: to be kept up to date by the run.
    """

    def __init__(self, rank: int) -> None:
        self.step = 0
        self.others: list[Peer] = []
        self._reported: list[str] = []
        self._failure, self._ending = "", False
        self._main = threading.get_ident()
        self._server = socket.create_server(("", 0), backlog=256)
        address = (own_address(os.environ.get("MASTER_ADDR", "127.0.0.1")), int(self._server.getsockname()[1]))
        self.me = Peer(rank, socket.gethostname(), os.getpid(), address)
        threading.Thread(target=self._serve, daemon=True).start()

    def meet(self, everyone: list[Peer]) -> None:
        """Take all ranks of the run, this one included."""
        self.others = [peer for peer in everyone if peer != self.me]

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Report an error in this context to the other ranks.

        Raises PeerError instead of the error of a failed exchange, and prints it on stderr at once, before the process
        has ended.
        """
        try:
            yield
        except Exception as error:
            self._ending = True
            place = f"step {self.step}, {_place(_frames(error))}"
            if not failed_exchange(error):
                self._report(f"{self.me} failed at {place}: {type(error).__name__}: {_short(error)}", self.others)
                raise
            answers = self._ask_all(self.others, {})
            reason = next(iter(self._reported), None) or self._verdict(answers)
            failure = PeerError(f"{place}: {reason}. This is {self.me}, whose exchange ended with: {_short(error)}")
            print(f"alfb: {failure}", file=sys.stderr, flush=True)
            self._report(reason, [peer for peer, answer in zip(self.others, answers) if "silent" not in answer])
            raise failure from error

    def _ask_all(self, peers: list[Peer], question: dict[str, str]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(max_workers=64) as pool:
            return list(pool.map(lambda peer: _ask(peer, question), peers))

    def _report(self, failure: str, peers: list[Peer]) -> None:
        """Send the reason of this rank's end to these peers, and give the others time to ask for it."""
        self._failure = failure
        if peers:
            self._ask_all(peers, {"failure": failure})
            time.sleep(LINGER_SECONDS)

    def _verdict(self, answers: list[dict[str, Any]]) -> str:
        """Return the cause of a failed exchange, by the other ranks' answers."""
        failures = [answer["failure"] for answer in answers if answer.get("failure")]
        if failures:
            return str(failures[0])
        silent = [(peer, answer["silent"]) for peer, answer in zip(self.others, answers) if "silent" in answer]
        if silent:
            return "; ".join(f"{reason}: {_listed(peers)}" for reason, peers in _grouped(silent).items())
        elsewhere = [
            (peer, f"step {answer['step']}, {answer['where']}")
            for peer, answer in zip(self.others, answers)
            if (answer["step"], answer["waits"]) != (self.step, True)
        ]
        if elsewhere:
            return "; ".join(f"still at {place}: {_listed(peers)}" for place, peers in _grouped(elsewhere).items())
        return "every rank answers and waits for an exchange of this step, so look at the network between them"

    def _position(self) -> dict[str, Any]:
        frames, frame = [], sys._current_frames().get(self._main)
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        waits = self._ending or any(Path(f.f_code.co_filename).name in _WAITING for f in frames)
        return {"step": self.step, "where": _place(frames[::-1]), "waits": waits, "failure": self._failure}

    def close(self) -> None:
        """Stop answering."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for questions
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                connection = self._server.accept()[0]
            except OSError:  # closed
                return
            with contextlib.suppress(OSError, ValueError), connection:
                connection.settimeout(ANSWER_SECONDS)
                question = json.loads(connection.makefile().readline())
                if failure := question.get("failure"):
                    self._reported.append(str(failure))
                connection.sendall(json.dumps(self._position()).encode() + b"\n")


def failed_exchange(error: BaseException) -> bool:
    """Return whether the error is the backend's, of an exchange that failed."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _ask(peer: Peer, question: dict[str, str]) -> dict[str, Any]:
    """Return the rank's answer, or the reason why there is none under "silent"."""
    try:
        with socket.create_connection(peer.address, timeout=ANSWER_SECONDS) as connection:
            connection.sendall(json.dumps(question).encode() + b"\n")
            text = connection.makefile().readline()
            if not text:
                raise ConnectionResetError
            answer: dict[str, Any] = json.loads(text)
            return answer
    except TimeoutError:
        return {"silent": "no answer (stopped, or its host is cut off)"}
    except (ConnectionRefusedError, ConnectionResetError):
        return {"silent": "the process is gone"}
    except (OSError, ValueError) as error:
        return {"silent": f"not reached ({error})"}


def _frames(error: BaseException) -> list[FrameType]:
    """Return the frames in which the error was raised, outermost first."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return frames


def _place(frames: list[FrameType]) -> str:
    """Return the outermost and the innermost function of the package among the frames, below the run's loop."""
    codes = [frame.f_code for frame in frames]
    ours = [code for code in codes if code.co_filename.startswith(_PACKAGE) and code.co_filename != __file__]
    names = [code.co_name for code in ours if not code.co_name.startswith("<")]
    if "train" in names:
        names = names[names.index("train") + 1 :]
    return " > ".join(dict.fromkeys([*names[:1], *names[-1:]])) or "the loop"


def _short(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].removeprefix("[").split("] ", 1)[-1]


def _grouped(pairs: list[tuple[Peer, str]]) -> dict[str, list[Peer]]:
    groups: dict[str, list[Peer]] = {}
    for peer, reason in pairs:
        groups.setdefault(reason, []).append(peer)
    return groups


def _listed(peers: list[Peer], most: int = 8) -> str:
    more = f" and {len(peers) - most} more" if len(peers) > most else ""
    return ", ".join(map(str, peers[:most])) + more
