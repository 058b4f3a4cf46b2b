"""`alfb train`: a training run, or what it would be."""

from __future__ import annotations

import argparse
from pathlib import Path

from alfb_dist.cli.launcher import Subcommands, launched_world
from alfb_dist.config import Config, ConfigError, config_to_toml, load_config
from alfb_dist.stop import DONE


def add(commands: Subcommands) -> None:
    """The command and its options."""
    train = commands.add_parser("train", help="train a model; under a launcher, one process a rank")
    train.add_argument("config", nargs="?", type=Path, help="a TOML file, such as configs/demo.toml")
    train.add_argument("--config", dest="config_option", type=Path, metavar="CONFIG", help="the same as an option")
    train.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="such as balance.rate=0.001"
    )
    train.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    train.add_argument("--dry-run", action="store_true", help="print sizes, memory and bytes exchanged, and stop")
    train.add_argument("--ranks", type=int, help="for --dry-run: the number of ranks (default: ep_degree)")
    train.add_argument(
        "--profile", action="store_true", help="keep a profiler trace of a few steps in the run folder, and tell"
    )
    train.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # added by launchers
    train.set_defaults(run=_train)


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

    return train(config, profile=arguments.profile)


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
