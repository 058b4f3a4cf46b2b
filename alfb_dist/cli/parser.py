"""What the commands share."""

from __future__ import annotations

from typing import Any

from alfb_dist.distributed.rendezvous import launched_world

__all__ = ["Subcommands", "launched_world"]

Subcommands = Any
"""What argparse's add_subparsers returns: the commands of a parser, to which each file here adds its own."""
