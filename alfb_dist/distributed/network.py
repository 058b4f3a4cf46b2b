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


INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


def choose_interface(master: str, asked: str = "") -> str | None:
    """The ranks will use the interface that was asked for, else the one that leads to the first rank's host.

    Returns its name, None where the choice is left to gloo: that is the address of this host's own name, on many hosts
    a loopback address that no other host reaches. Variables of the environment that are set stay as they are.
    Raises ValueError if this host has no interface of the name asked for.
    """
    if asked and asked not in psutil.net_if_addrs():
        raise ValueError(f"run.interface ({asked}): this host has {', '.join(sorted(psutil.net_if_addrs()))}")
    found = asked or interface_of(own_address(master))
    if found:
        for variable in INTERFACE_VARIABLES:
            os.environ.setdefault(variable, found)
    return os.environ.get(INTERFACE_VARIABLES[0])
