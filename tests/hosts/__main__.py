"""The command: python -m tests.hosts up | run | link | slow | down."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from .cluster import Hosts
from .namespaces import what_is_missing


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.hosts", description="Hosts out of network namespaces.")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/alfb-hosts"), help="directory of the hosts (default: %(default)s)"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="make hosts")
    up.add_argument("--hosts", type=int, default=2)
    run = commands.add_parser("run", help="run a command on a host")
    run.add_argument("host")
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    link = commands.add_parser("link", help="cut a host off, or reconnect it")
    link.add_argument("host")
    link.add_argument("state", choices=("up", "down"))
    slow = commands.add_parser("slow", help="delay and lose frames between hosts")
    slow.add_argument("--delay-ms", type=float, default=0, help="one way")
    slow.add_argument("--loss", type=float, default=0, help="fraction of the frames, such as 0.01")
    commands.add_parser("down", help="remove the hosts")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    if reason := what_is_missing():
        print(reason, file=sys.stderr)
        return 1
    if arguments.command == "up":
        hosts = Hosts.up(arguments.folder, arguments.hosts, die_with_parent=False)
        print("\n".join(f"{name} {hosts.address(name)}" for name in hosts.names))
        return 0
    hosts = Hosts.load(arguments.folder)
    if arguments.command == "run":
        words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
        return subprocess.run([*hosts.holders[arguments.host].enter(), *words], check=False).returncode
    if arguments.command == "link":
        hosts.link(arguments.host, up=arguments.state == "up")
    elif arguments.command == "slow":
        hosts.slow(delay_ms=arguments.delay_ms, loss=arguments.loss)
    else:
        hosts.down()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, RuntimeError, KeyError) as error:
        sys.exit(f"hosts: {error}")
