"""The hosts of a run: one "name slots=N" a line, as the deepspeed launcher and mpirun read them."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from pathlib import Path

from alfb_dist.config import ConfigError

DEEPSPEED_HOSTFILE = Path("/job/hostfile")
"""Where the deepspeed launcher looks unless told otherwise."""


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the ranks of each host, in the file's order. Raises ConfigError naming the file and the line."""
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
                f"{path}, line {number} ({line!r}): must be a host and its ranks, such as 'node1 slots=8'"
            )
        if found[1] in hosts:
            raise ConfigError(f"{path}, line {number}: {found[1]} is listed twice; give it once, with all its slots")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError(f"{path}: lists no host; give one 'name slots=N' a line")
    return hosts


def ssh_command() -> list[str]:
    """The words before a host's name, with the options that pdsh gets too."""
    return ["ssh", *shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))]


def address_of(host: str) -> str:
    """The IPv4 address of a host, which may be known to ssh's configuration alone. ConfigError if it is not known."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        try:
            return socket.gethostbyname(_ssh_name(host))
        except OSError:
            raise ConfigError(f"the host {host} is not known here ({error}): mend its name or the hostfile") from None


def _ssh_name(host: str) -> str:
    """The name or address that ssh's configuration has for a host; the host itself where it has none."""
    asked = [*ssh_command(), "-G", host]
    done = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    lines = (line.split(maxsplit=1) for line in done.stdout.splitlines())
    return next((words[1] for words in lines if words[0] == "hostname"), host)


def address_toward(addresses: list[str]) -> str:
    """The address of this host from which the first of these is reached that is not this host itself."""
    for address in addresses:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
            try:
                probe.connect((address, 9))
            except OSError:
                continue
            own = str(probe.getsockname()[0])
        if own != address and not own.startswith("127."):
            return own
    return next((address for address in addresses if not address.startswith("127.")), "127.0.0.1")
