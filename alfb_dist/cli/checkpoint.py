"""`alfb checkpoint`: look into checkpoints, check them, turn them into other forms."""

from __future__ import annotations

import argparse
from pathlib import Path

from alfb_dist.cli.launcher import Subcommands
from alfb_dist.stop import DONE


def add(commands: Subcommands) -> None:
    """The command and its options."""
    saves = commands.add_parser("checkpoint", help="look into checkpoints").add_subparsers(
        required=True, metavar="ACTION"
    )
    for name, text in (("inspect", "what a checkpoint holds"), ("verify", "whether a checkpoint is undamaged")):
        action = saves.add_parser(name, help=text)
        action.add_argument("path", type=Path, help="a folder such as runs/demo/checkpoints/step-00000200")
        action.set_defaults(run=_inspect if name == "inspect" else _verify)
    export = saves.add_parser("to-hf", help="write a checkpoint as a folder that transformers loads; one process")
    export.add_argument("path", type=Path, metavar="CHECKPOINT", help="such as runs/demo/checkpoints/step-00000200")
    export.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    export.add_argument("--config", type=Path, help="the run's config.json (default: the one in the run's folder)")
    export.set_defaults(run=_to_hf)


def _inspect(arguments: argparse.Namespace) -> int:
    from alfb_dist.checkpoint import describe

    for name, value in describe(arguments.path).items():
        print(f"{name}: {value}")
    return DONE


def _to_hf(arguments: argparse.Namespace) -> int:
    import json

    import torch
    from transformers import AutoConfig

    from alfb_dist.pretrained import to_hf

    file = arguments.config or arguments.path.resolve().parent.parent / "config.json"
    model = json.loads(file.read_text())["config"]["model"]
    if model["path"]:
        config = AutoConfig.from_pretrained(model["path"], trust_remote_code=False, local_files_only=True)
    else:
        config = AutoConfig.for_model(model["family"], **model["config"])
    to_hf(arguments.path, arguments.out, config, dtype=getattr(torch, model["dtype"]))
    print(arguments.out)
    return DONE


def _verify(arguments: argparse.Namespace) -> int:
    from alfb_dist.checkpoint import verify

    problems = verify(arguments.path)
    print("\n".join(problems) if problems else f"{arguments.path}: undamaged")
    return 1 if problems else DONE
