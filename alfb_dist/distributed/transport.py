"""What an exchange asks of a transport, which carries messages of bytes between the ranks of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor


class Header(NamedTuple):
    """What a rank says about its message to another."""

    num_rows: int  # negative if the sender's row counts do not add up: then it sends nothing
    number: int = 0  # the caller's own


Accept = Callable[[list[Header]], list[int]]
"""Given the header of each rank, returns the bytes of each rank's message. Raises RuntimeError if a header is wrong."""


class Transport(Protocol):
    """Carries a message from each rank of a group to each other rank. One exchange at a time."""

    needs_headers: bool
    """Whether messages cannot be found without their headers, even where their sizes are known."""

    def buffers(self, sizes: list[int]) -> list[Tensor]:
        """Return the memory for the message to each rank, of that many bytes (uint8), to be filled before `start`."""

    def start(self, headers: list[Header], accept: Accept, sizes: list[int] | None) -> Callable[[], list[Tensor]]:
        """Send the buffers; collective. The returned function waits for the message of each rank and returns them.

        sizes: bytes from each rank, the same that it sends; None if the headers are to be exchanged for that.
        accept: called once with the headers, here or in the returned function, unless sizes are given.
        Messages can be read until the next exchange is started.
        """
