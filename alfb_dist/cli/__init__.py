"""The `alfb` command, one file a command. A command imports what it needs when it runs, so that help and configuration
errors are printed at once."""

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
    parser = argparse.ArgumentParser(
        prog="alfb",
        description="Train Mixture-of-Experts models on DeepSpeed, with auxiliary-loss-free load balancing.",
        epilog="Exit codes: 0 done; 75 stopped after saving a checkpoint; 78 invalid configuration; 128+n killed by "
        "signal n; anything else a failure.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


PRINT_SECONDS = 3.0
"""How long other ranks wait for rank 0 to print an error. Launchers kill it as soon as another rank ends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Rank 0 prints an error that the user can fix; its exit code is 78."""
    arguments = _parser().parse_args(argv)
    # In a training run only a configuration error is for the user; any other error needs its traceback.
    user_errors = (ConfigError,) if arguments.command in ("train", "launch") else (ValueError, OSError)
    try:
        return int(arguments.run(arguments))
    except user_errors as error:
        if launched_world()[0] == 0:
            print(f"alfb: {error}", file=sys.stderr)
        else:
            time.sleep(PRINT_SECONDS)
        return BAD_CONFIG


def run_and_leave(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code."""
    try:
        code = main(argv)
    except RuntimeError as error:
        _exit_after_peer_error(error)
        raise
    if "torch.distributed" not in sys.modules:
        sys.exit(code)

    from alfb_dist.distributed.topology import leave

    leave(code)


def _exit_after_peer_error(error: RuntimeError) -> None:
    """End the process with exit code 1 if the error is that other ranks are missing, which is already reported.

    Without Python's own shutdown, in which process groups with a failed exchange hang or abort.
    """
    if "alfb_dist.distributed.liveness" in sys.modules:
        from alfb_dist.distributed.liveness import PeerError

        if isinstance(error, PeerError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(FAILED)
