"""The master port, and the network interface to the other hosts."""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil

from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.result import Result, ok, problem, warning
from alfb_dist.config import ConfigError
from alfb_dist.distributed.launch.hostfile import address_of
from alfb_dist.distributed.launch.plan import MASTER_PORT, first_address
from alfb_dist.distributed.launch.preflight import port_error
from alfb_dist.distributed.network import INTERFACE_VARIABLES, interface_of, own_address


def judge_port(port: int, error: str) -> Result:
    """Judge the launchers' default port. error: why it is not free, or empty."""
    if not error:
        return ok("master port", f"{port} is free")
    fix = "choose another with --master-port, or end the process that listens there (ss -ltnp)"
    return warning("master port", f"{port} is not free: {error}", fix)


def judge_interface(master: str, own: str, name: str | None, several: bool) -> Result:
    """Judge the route to the master. own: our address on it. name: its interface, or None. several: hosts."""
    check = "interface"
    if several and own.startswith("127."):
        found = f"{master} resolves to {own} here, which other hosts cannot reach"
        return problem(check, found, "set --master-addr to its network address, or fix /etc/hosts")
    if name is None:
        return problem(check, f"no interface leads to {master}", f"check `ip route get {master}`")
    return ok(check, f"{name}, {own}, toward {master}")


def judge_chosen(variable: str, chosen: str, present: list[str]) -> Result | None:
    """Judge whether the interfaces that a variable names exist; None if they do."""
    missing = [name for name in chosen.split(",") if name and name not in present]
    if not missing or (variable.startswith("NCCL") and _is_pattern(chosen, present)):
        return None
    return problem(variable, f"there is no interface {', '.join(missing)}", f"set it to one of {', '.join(present)}")


def _is_pattern(chosen: str, present: list[str]) -> bool:
    """Return whether NCCL would find an interface: names are prefixes; ^ excludes them, = makes them exact."""
    sign, names = (chosen[0], chosen[1:]) if chosen[:1] in "^=" else ("", chosen)
    matches = [p for p in present for n in names.split(",") if (p == n if sign == "=" else p.startswith(n))]
    return len(set(matches)) < len(present) if sign == "^" else bool(matches)


def _master(case: Case) -> str:
    """Return the address of rank 0."""
    return os.environ.get("MASTER_ADDR") or first_address([address_of(host) for host in case.hosts])


def check_network(case: Case) -> Iterator[Result]:
    """Check the master port, the route to the master and the chosen interfaces."""
    port = int(os.environ.get("MASTER_PORT", MASTER_PORT))
    yield judge_port(port, port_error(port))
    try:
        master = _master(case)
    except ConfigError as error:
        yield problem("interface", str(error), "add the host to /etc/hosts, DNS or ssh's configuration")
    else:
        own = own_address(master)
        yield judge_interface(master, own, interface_of(own), len(case.hosts) > 1)
    chosen = {name: os.environ.get(name, "") for name in INTERFACE_VARIABLES}
    chosen["run.interface"] = case.config.run.interface if case.config else ""
    for variable, names in chosen.items():
        if result := judge_chosen(variable, names, list(psutil.net_if_addrs())):
            yield result
