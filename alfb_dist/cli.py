"""The `alfb` command. Only the part that a command needs is imported, so that refusals and help come at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from alfb_dist.config import Config, ConfigError, config_to_toml, load_config
from alfb_dist.stop import BAD_CONFIG, DONE


def _launched(*names: str, default: str) -> str:
    return next((os.environ[name] for name in names if name in os.environ), default)


def launched_world() -> tuple[int, int]:
    """(rank, world size) as the launcher has set them in the environment; (0, 1) without one."""
    rank = _launched("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", default="0")
    world = _launched("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", default="1")
    return int(rank), int(world)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alfb", description="Balanced expert-parallel MoE training on DeepSpeed.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model; under a launcher, one process a rank")
    train.add_argument("config", nargs="?", type=Path, help="a TOML file, such as configs/demo.toml")
    train.add_argument("--config", dest="config_option", type=Path, metavar="CONFIG", help="the same as an option")
    train.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="such as balance.rate=0.001"
    )
    train.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    train.add_argument("--dry-run", action="store_true", help="print sizes, memory and bytes exchanged, and stop")
    train.add_argument("--ranks", type=int, help="for --dry-run: the number of ranks (default: ep_degree)")
    train.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # added by launchers
    train.set_defaults(run=_train)

    report = commands.add_parser("report", help="draw a run's report.html, also while it runs")
    report.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder, such as runs/demo")
    report.set_defaults(run=_report)

    data = commands.add_parser("data", help="prepare token files").add_subparsers(required=True, metavar="ACTION")
    prepare = data.add_parser("prepare", help="turn text into token files")
    prepare.add_argument("source", nargs="+", help='files, folders, or "python-stdlib"')
    prepare.add_argument("--cache", default="data-cache", help="folder of the token files (default: data-cache)")
    prepare.add_argument("--tokenizer", default="bytes", help='"bytes", a tokenizer.json, or a transformers folder')
    prepare.add_argument("--end-token", help="the tokenizer's end-of-document token, if it is not a usual one")
    prepare.add_argument("--validation-fraction", type=float, default=0.05, help="share of the files (default: 0.05)")
    prepare.set_defaults(run=_prepare)

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
    return parser


def _train(arguments: argparse.Namespace) -> int:
    path = arguments.config or arguments.config_option
    if path is None:
        raise ConfigError("no configuration given: alfb train configs/demo.toml")
    if arguments.print_config:
        print(config_to_toml(load_config(path, arguments.overrides)), end="")
        return DONE
    if arguments.dry_run:
        return _dry_run(load_config(path, arguments.overrides), arguments.ranks)
    config = load_config(path, arguments.overrides, world_size=launched_world()[1])

    from alfb_dist.train import train

    return train(config)


def _dry_run(config: Config, ranks: int | None) -> int:
    world_size = max(launched_world()[1], config.parallel.ep_degree) if ranks is None else ranks
    if world_size < 1 or world_size % config.parallel.ep_degree:
        raise ConfigError(
            f"--ranks ({world_size}) must be a multiple of parallel.ep_degree ({config.parallel.ep_degree})"
        )

    from rich.console import Console
    from rich.table import Table

    from alfb_dist.estimate import estimate, table_rows

    table = Table("what", "how much", title=f"{config.run.name}: nothing was started")
    for row in table_rows(estimate(config, world_size), world_size, config):
        table.add_row(*row)
    Console().print(table)
    return DONE


def _report(arguments: argparse.Namespace) -> int:
    from alfb_dist.report import write_html

    print(write_html(arguments.run_folder))
    return DONE


def _prepare(arguments: argparse.Namespace) -> int:
    from alfb_dist.data import TokenFile, prepare

    prepared = prepare(
        arguments.source,
        arguments.cache,
        tokenizer=arguments.tokenizer,
        end_token=arguments.end_token,
        validation_fraction=arguments.validation_fraction,
        progress=True,
    )
    for path in (prepared.train, prepared.validation):
        with TokenFile(path) as file:
            print(f"{path}: {file.num_tokens:,} tokens in {file.num_documents:,} documents")
    print(f"left out: {prepared.num_empty} empty and {prepared.num_undecodable} undecodable files")
    return DONE


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code. What a user can mend is told once, by rank 0, and exits with 78."""
    arguments = _parser().parse_args(argv)
    # In a training run only a bad configuration is the user's to mend; anything else deserves its traceback.
    mendable = (ConfigError,) if arguments.run is _train else (ValueError, OSError)
    try:
        return int(arguments.run(arguments))
    except mendable as error:
        if launched_world()[0] == 0:
            print(f"alfb: {error}", file=sys.stderr)
        return BAD_CONFIG


def run_and_leave(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process with its exit code."""
    code = main(argv)
    if "torch.distributed" not in sys.modules:
        sys.exit(code)

    from alfb_dist.topology import leave

    leave(code)


if __name__ == "__main__":
    run_and_leave()
