"""Which of this host's addresses and interfaces lead to the other hosts of a run."""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil


def own_address(master: str) -> str:
    """The address by which the other hosts reach this one: where what is sent to the first rank's host leaves.

    master: name or address of the first rank's host. On that host itself its own, as the others know it.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.connect(target)  # sends nothing
            own = str(s.getsockname()[0])
    except OSError:
        return master
    # A host may know its own name by a loopback address only.
    return master if ipaddress.ip_address(own).is_loopback else own


def interface_of(address: str) -> str | None:
    """The name of the interface that has this address, such as eth0; None if this host has none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.split("%")[0] == address for a in addresses):
            return name
    return None


def choose_interface(master: str) -> str | None:
    """gloo will use the interface that leads to the first rank's host; its name, None where gloo's choice stays.

    Left to itself gloo takes the address of this host's own name, which on many hosts is a loopback address: no other
    host reaches it. GLOO_SOCKET_IFNAME, if set, stays as it is.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return os.environ["GLOO_SOCKET_IFNAME"]
    found = interface_of(own_address(master))
    if found:
        os.environ["GLOO_SOCKET_IFNAME"] = found
    return found
