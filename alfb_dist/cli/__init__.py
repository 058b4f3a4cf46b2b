"""The `alfb` command, one file a command. Only the part that a command needs is imported, so that refusals and help
come at once."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from alfb_dist.cli import bench, checkpoint, data, doctor, launch, report, train
from alfb_dist.config import ConfigError
from alfb_dist.distributed.launch.signals import BAD_CONFIG, FAILED
from alfb_dist.distributed.rendezvous import launched_world

COMMANDS = (train, launch, report, data, checkpoint, doctor, bench)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alfb", description="Balanced expert-parallel MoE training on DeepSpeed.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


TELLING_SECONDS = 3.0
"""How long other ranks leave rank 0 to tell why: launchers kill it as soon as another rank has ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code. What a user can fix is told once, by rank 0, and exits with 78."""
    arguments = _parser().parse_args(argv)
    # In a training run only a bad configuration is the user's to fix; anything else deserves its traceback.
    fixable = (ConfigError,) if arguments.command in ("train", "launch") else (ValueError, OSError)
    try:
        return int(arguments.run(arguments))
    except fixable as error:
        if launched_world()[0] == 0:
            print(f"alfb: {error}", file=sys.stderr)
        else:
            time.sleep(TELLING_SECONDS)
        return BAD_CONFIG


def run_and_leave(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process with its exit code."""
    try:
        code = main(argv)
    except RuntimeError as error:
        _end_if_left_alone(error)
        raise
    if "torch.distributed" not in sys.modules:
        sys.exit(code)

    from alfb_dist.distributed.topology import leave

    leave(code)


def _end_if_left_alone(error: RuntimeError) -> None:
    """The process has ended with 1 if the error is that others are missing, which has been told.

    At once: while Python winds itself down, process groups whose exchange failed hang or abort the process.
    """
    if "alfb_dist.distributed.liveness" in sys.modules:
        from alfb_dist.distributed.liveness import PeerError

        if isinstance(error, PeerError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(FAILED)
