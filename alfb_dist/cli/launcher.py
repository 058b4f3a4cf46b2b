"""What the launcher has told this process in the environment."""

from __future__ import annotations

import os
from typing import Any

Subcommands = Any
"""What argparse's add_subparsers returns: the commands of a parser, to which each file here adds its own."""


def _launched(*names: str, default: str) -> str:
    return next((os.environ[name] for name in names if name in os.environ), default)


def launched_world() -> tuple[int, int]:
    """(rank, world size) as the launcher has set them in the environment; (0, 1) without one."""
    rank = _launched("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", default="0")
    world = _launched("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", default="1")
    return int(rank), int(world)
