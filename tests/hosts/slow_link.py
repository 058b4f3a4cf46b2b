"""A slow, lossy link between test hosts: frames of tap devices are passed on late, or not at all.

The kernel's netem does the same where it is built in. Started by `Hosts.slow` inside the switch's network:

    python slow_link.py DELAY_MS LOSS TAP...
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_FRAME = 1 << 16


def open_tap(name: str) -> int:
    """Return a file of whole Ethernet frames, which reads what the network sends into the device."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return file


def relay(taps: list[int], delay_seconds: float, loss: float) -> None:
    """Pass frames on for ever, each to the tap of its receiver, or to all others if that is unknown."""
    chance, tap_of = random.Random(0), {}  # tap_of: by address
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    poll = select.poll()
    for tap in taps:
        poll.register(tap, select.POLLIN)
    while True:
        wait_ms = max(0.0, (waiting[0][0] - time.monotonic()) * 1000) if waiting else 1000
        for tap, _ in poll.poll(wait_ms):
            for _ in range(256):
                try:
                    frame = os.read(tap, _FRAME)
                except BlockingIOError:
                    break
                tap_of[frame[6:12]] = tap
                if chance.random() < loss:
                    continue
                to = tap_of.get(frame[:6])
                due = time.monotonic() + delay_seconds
                for other in [to] if to is not None else taps:
                    if other != tap:
                        number += 1
                        heapq.heappush(waiting, (due, number, other, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, tap, frame = heapq.heappop(waiting)
            try:
                os.write(tap, frame)
            except (BlockingIOError, OSError):  # a full queue or a cut link loses frames, as real ones do
                continue


if __name__ == "__main__":
    relay([open_tap(name) for name in sys.argv[3:]], float(sys.argv[1]) / 1000, float(sys.argv[2]))
