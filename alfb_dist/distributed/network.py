"""This host's address and interface toward the other hosts of a run."""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil


def own_address(master: str) -> str:
    """Return the address by which the other hosts reach this one: the source address toward the first rank's host.

    master: name or address of the first rank's host; also the result if this host has no other address toward it.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.connect(target)  # sends nothing
            own = str(s.getsockname()[0])
    except OSError:
        return master
    # A host may resolve its own name to a loopback address.
    return master if ipaddress.ip_address(own).is_loopback else own


def interface_of(address: str) -> str | None:
    """Return the name of the interface with this address, such as eth0; None if this host has none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.split("%")[0] == address for a in addresses):
            return name
    return None


INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


def choose_interface(master: str, interface: str = "") -> str | None:
    """Let the backends use the interface, by default the one toward the first rank's host, and return its name.

    Environment variables that are set already are kept. Returns None if the choice is left to gloo, which takes the
    address of this host's name: on many hosts a loopback address that no other host reaches.
    Raises ValueError if this host has no such interface.
    """
    interfaces = psutil.net_if_addrs()
    if interface and interface not in interfaces:
        raise ValueError(f"run.interface ({interface}) must be one of this host's: {', '.join(sorted(interfaces))}")
    found = interface or interface_of(own_address(master))
    if found:
        for variable in INTERFACE_VARIABLES:
            os.environ.setdefault(variable, found)
    return os.environ.get(INTERFACE_VARIABLES[0])
