"""The master's port, and the interface over which this host talks to the others."""

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
    """Whether the launchers' usual port can be had. error: why not."""
    if not error:
        return ok("master port", f"{port} is free")
    fix = "give another: --master-port, or end what listens there (ss -ltnp)"
    return warning("master port", f"{port} cannot be had: {error}", fix)


def judge_interface(master: str, own: str, name: str | None, several: bool) -> Result:
    """own: our address toward the master. name: the interface that has it, None if none has. several: hosts."""
    check = "interface"
    if several and own.startswith("127."):
        found = f"{master} is {own} here, which other hosts cannot reach"
        return problem(check, found, "give its address in the network: --master-addr, or fix /etc/hosts")
    if name is None:
        return problem(check, f"no interface leads to {master}", f"see `ip route get {master}`")
    return ok(check, f"{name}, {own}, toward {master}")


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


def _master(case: Case) -> str:
    """Where the ranks would meet."""
    return os.environ.get("MASTER_ADDR") or first_address([address_of(host) for host in case.hosts])


def check_network(case: Case) -> Iterator[Result]:
    """The port and the interface."""
    port = int(os.environ.get("MASTER_PORT", MASTER_PORT))
    yield judge_port(port, port_error(port))
    try:
        master = _master(case)
    except ConfigError as error:
        yield problem("interface", str(error), "put the host into /etc/hosts, DNS or ssh's configuration")
    else:
        own = own_address(master)
        yield judge_interface(master, own, interface_of(own), len(case.hosts) > 1)
    chosen = {name: os.environ.get(name, "") for name in INTERFACE_VARIABLES}
    chosen["run.interface"] = case.config.run.interface if case.config else ""
    for variable, names in chosen.items():
        if result := judge_chosen(variable, names, list(psutil.net_if_addrs())):
            yield result
