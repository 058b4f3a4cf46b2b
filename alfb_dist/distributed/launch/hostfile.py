"""The hosts of a run: one line "name slots=N" for each, as the deepspeed launcher and mpirun read them."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from pathlib import Path

from alfb_dist.config import ConfigError

DEEPSPEED_HOSTFILE = Path("/job/hostfile")
"""The deepspeed launcher's default."""


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the number of ranks of each host, in the file's order. Raises ConfigError naming the file and the line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if not found or not int(found[2]):
            raise ConfigError(
                f"{path}, line {number} ({line!r}): must be a host and its number of ranks, such as 'node1 slots=8'"
            )
        if found[1] in hosts:
            raise ConfigError(f"{path}, line {number}: {found[1]} is listed twice; give it once, with all its slots")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError(f"{path}: lists no host; add a line 'name slots=N' for each")
    return hosts


def ssh_command() -> list[str]:
    """Return the ssh command up to the host's name, with the options that pdsh gets too."""
    return ["ssh", *shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))]


def address_of(host: str) -> str:
    """Return the IPv4 address of a host that DNS or ssh's configuration knows. Raises ConfigError if neither does."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        try:
            return socket.gethostbyname(_ssh_name(host))
        except OSError:
            raise ConfigError(f"the host {host} is not known here ({error}): fix its name or the hostfile") from None


def _ssh_name(host: str) -> str:
    """Return the name or address that ssh's configuration has for a host, or the host itself."""
    command = [*ssh_command(), "-G", host]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    lines = (line.split(maxsplit=1) for line in done.stdout.splitlines())
    return next((words[1] for words in lines if words[0] == "hostname"), host)


def address_toward(addresses: list[str]) -> str:
    """Return this host's address toward the first of these addresses that is not its own."""
    for address in addresses:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
            try:
                probe.connect((address, 9))
            except OSError:
                continue
            own = str(probe.getsockname()[0])
        if own != address and not own.startswith("127."):
            return own
    return next((address for address in addresses if not address.startswith("127.")), "127.0.0.1")
