"""The master's port, and the interface over which this host talks to the others."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping

import psutil

from alfb_dist.doctor.case import Case
from alfb_dist.doctor.result import Result, ok, problem, warning

DEFAULT_PORT = 29500  # of deepspeed and torchrun
_ANY_PORT = 9  # to find a route; nothing is sent


def judge_port(port: int, free: bool) -> Result:
    """Whether the launchers' usual port can be had."""
    if free:
        return ok("master port", f"{port} is free")
    mend = "give another: deepspeed --master_port, torchrun --master-port, or end what listens there (ss -ltnp)"
    return warning("master port", f"{port} is taken by another process", mend)


def judge_interface(master: str, route: str | None, name: str, own: str | None, several: bool, chosen: str) -> Result:
    """route: our address toward the master, None without one; name: its interface. own: the address that our host name
    stands for. chosen: GLOO_SOCKET_IFNAME."""
    check = "interface"
    if route is None:
        return problem(check, f"no address or no route for {master}", "put the host into /etc/hosts or DNS")
    found = f"{name or 'an unnamed interface'}, {route}, toward {master}"
    if not several:
        return ok(check, found)
    if route.startswith("127."):
        found = f"{master} is {route} here, which other hosts cannot reach"
        return problem(check, found, "give its address in the network: --master_addr, or mend /etc/hosts")
    if not chosen and (own is None or own.startswith("127.")):
        found = f"gloo would take {own or 'loopback'}, which this host's name stands for, not {name}"
        return problem(check, found, f"export GLOO_SOCKET_IFNAME={name} (and NCCL_SOCKET_IFNAME) on every host")
    return ok(check, found)


def judge_chosen(variable: str, chosen: str, present: list[str]) -> Result | None:
    """Whether the interfaces that a variable names are there; None where all is well."""
    missing = [name for name in chosen.split(",") if name and name not in present]
    if not missing or (variable.startswith("NCCL") and _is_pattern(chosen, present)):
        return None
    return problem(variable, f"there is no interface {', '.join(missing)}", f"set it to one of {', '.join(present)}")


def _is_pattern(chosen: str, present: list[str]) -> bool:
    """Whether NCCL would find an interface: it takes beginnings of names, ^ for all others, = for whole names."""
    sign, names = (chosen[0], chosen[1:]) if chosen[:1] in "^=" else ("", chosen)
    matches = [p for p in present for n in names.split(",") if (p == n if sign == "=" else p.startswith(n))]
    return len(set(matches)) < len(present) if sign == "^" else bool(matches)


def port_is_free(port: int) -> bool:
    """Whether a process could listen on the port."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError:
            return False
        return True


def address_of(name: str) -> str | None:
    """The IPv4 address that a name stands for here, or None."""
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def route_to(host: str) -> str | None:
    """The address of ours from which packets to the host would leave, or None; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect((host, _ANY_PORT))
        except OSError:
            return None
        return str(s.getsockname()[0])


def _addresses() -> Mapping[str, list[str]]:
    return {name: [a.address for a in found] for name, found in psutil.net_if_addrs().items()}


def check_network(case: Case) -> Iterator[Result]:
    """The port and the interface."""
    port = int(os.environ.get("MASTER_PORT", DEFAULT_PORT))
    yield judge_port(port, port_is_free(port))
    master = os.environ.get("MASTER_ADDR") or next(iter(case.hosts), "127.0.0.1")
    route, addresses = route_to(master), _addresses()
    name = next((name for name, found in addresses.items() if route in found), "")
    gloo = os.environ.get("GLOO_SOCKET_IFNAME", "")
    yield judge_interface(master, route, name, address_of(socket.gethostname()), len(case.hosts) > 1, gloo)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if result := judge_chosen(variable, os.environ.get(variable, ""), list(addresses)):
            yield result
