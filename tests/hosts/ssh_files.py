"""The files that ssh needs between test hosts, in one directory: keys, settings of the client and of the server."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .namespaces import tool

# The directory is mounted as /etc/ssh on each host, so a plain `ssh host2` works there.
_CLIENT = """\
Host *
    IdentityFile /etc/ssh/id_ed25519
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking no
    BatchMode yes
    ConnectTimeout 5
    ServerAliveInterval 2
    ServerAliveCountMax 3
    LogLevel ERROR
"""
_SERVER = """\
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile /etc/ssh/authorized_keys
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
UseDNS no
MaxStartups 100
PidFile none
"""


def write_ssh_files(folder: Path) -> None:
    """Write ssh_config, sshd_config, a host key and an authorized user's key into a new directory."""
    folder.mkdir(mode=0o700)
    for name in ("id_ed25519", "ssh_host_ed25519_key"):
        make = [tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(folder / name)]
        subprocess.run(make, check=True, capture_output=True, timeout=30)
    (folder / "authorized_keys").write_bytes((folder / "id_ed25519.pub").read_bytes())
    (folder / "ssh_config").write_text(_CLIENT)
    (folder / "sshd_config").write_text(_SERVER)
