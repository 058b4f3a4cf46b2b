"""Each rank answers for itself, so that an exchange that fails can name who is missing.

A rank listens on a port of its own and tells any other where it stands: its step and the function it is in. When an
exchange fails, the rank asks all others; whoever does not answer is named, or whoever is somewhere else, or what
another rank has told of its own end. Nothing is sent while all goes well.
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
LINGER_SECONDS = 1.0  # a failed rank still answers so long, or others would take it for the one that failed first
_WAITING = ("distributed_c10d.py", "mailbox.py", "collectives.py")  # files whose functions wait for other ranks
_PACKAGE = str(Path(__file__).parents[1])


class PeerError(RuntimeError):
    """An exchange with other ranks failed; the message names step, operation and the ranks to look at."""


@dataclass(frozen=True)
class Peer:
    """A rank as others see it. address: where it answers."""

    rank: int
    host: str
    pid: int
    address: tuple[str, int]

    @property
    def place(self) -> str:
        """Its host by name, and by address where others reach it: hosts may share a name."""
        address = self.address[0]
        return self.host if address.startswith("127.") else f"{self.host} at {address}"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.place} (pid {self.pid})"


class Peers:
    """This rank's answers and questions. `me` is what the others must know; give all of them to `meet`."""

    def __init__(self, rank: int) -> None:
        self.step = 0
        self.others: list[Peer] = []
        self._told: list[str] = []
        self._failure, self._ending = "", False
        self._main = threading.get_ident()
        self._server = socket.create_server(("", 0), backlog=256)
        address = (own_address(os.environ.get("MASTER_ADDR", "127.0.0.1")), int(self._server.getsockname()[1]))
        self.me = Peer(rank, socket.gethostname(), os.getpid(), address)
        threading.Thread(target=self._serve, daemon=True).start()

    def meet(self, everyone: list[Peer]) -> None:
        """From now on the other ranks are known."""
        self.others = [peer for peer in everyone if peer != self.me]

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """An error in here is told to the others; one of an exchange becomes a PeerError that says who is missing.

        The latter is also on stderr at once, before the process has ended.
        """
        try:
            yield
        except Exception as error:
            self._ending = True
            place = f"step {self.step}, {_place(_frames(error))}"
            if not failed_exchange(error):
                self._tell(f"{self.me} failed at {place}: {type(error).__name__}: {_short(error)}", self.others)
                raise
            answers = self._each(self.others, {})
            reason = next(iter(self._told), None) or self._verdict(answers)
            told = PeerError(f"{place}: {reason}. This is {self.me}, whose exchange ended with: {_short(error)}")
            print(f"alfb: {told}", file=sys.stderr, flush=True)
            self._tell(reason, [peer for peer, answer in zip(self.others, answers) if "silent" not in answer])
            raise told from error

    def _each(self, peers: list[Peer], question: dict[str, str]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(max_workers=64) as pool:
            return list(pool.map(lambda peer: _ask(peer, question), peers))

    def _tell(self, failure: str, peers: list[Peer]) -> None:
        """These know why this rank ends, and the others can still ask."""
        self._failure = failure
        if peers:
            self._each(peers, {"failure": failure})
            time.sleep(LINGER_SECONDS)

    def _verdict(self, answers: list[dict[str, Any]]) -> str:
        """Who is to blame for a failed exchange, by what the others say of themselves."""
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
        """This rank does not answer any more."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for questions
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                line = self._server.accept()[0]
            except OSError:  # closed
                return
            with contextlib.suppress(OSError, ValueError), line:
                line.settimeout(ANSWER_SECONDS)
                question = json.loads(line.makefile().readline())
                if failure := question.get("failure"):
                    self._told.append(str(failure))
                line.sendall(json.dumps(self._position()).encode() + b"\n")


def failed_exchange(error: BaseException) -> bool:
    """Whether the error is the backend's own, of an exchange that did not come about."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _ask(peer: Peer, question: dict[str, str]) -> dict[str, Any]:
    """The rank's answer, or why there is none under "silent"."""
    try:
        with socket.create_connection(peer.address, timeout=ANSWER_SECONDS) as line:
            line.sendall(json.dumps(question).encode() + b"\n")
            words = line.makefile().readline()
            if not words:
                raise ConnectionResetError
            answer: dict[str, Any] = json.loads(words)
            return answer
    except TimeoutError:
        return {"silent": "no answer (stopped, or its host is cut off)"}
    except (ConnectionRefusedError, ConnectionResetError):
        return {"silent": "the process is gone"}
    except (OSError, ValueError) as error:
        return {"silent": f"not reached ({error})"}


def _frames(error: BaseException) -> list[FrameType]:
    """What was being called when the error came up, outermost first."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return frames


def _place(frames: list[FrameType]) -> str:
    """The outermost and the innermost function of the package among the frames, after the run's loop itself."""
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
