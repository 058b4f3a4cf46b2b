"""`alfb train`: a training run, or what it would be."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

import psutil

from alfb_dist.cli.parser import Subcommands, launched_world
from alfb_dist.config import Config, ConfigError, config_to_toml, load_config
from alfb_dist.distributed.launch.control_channel import ControlClient
from alfb_dist.distributed.launch.parents import launchers, watch
from alfb_dist.distributed.launch.signals import BAD_CONFIG, DONE, FAILED, PREEMPTED, StopSignals


def add(commands: Subcommands) -> None:
    """The command and its options."""
    train = commands.add_parser("train", help="train a model; under a launcher, one process a rank")
    add_settings(train)
    train.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    train.add_argument("--dry-run", action="store_true", help="print sizes, memory and bytes exchanged, and stop")
    train.add_argument("--ranks", type=int, help="for --dry-run: the number of ranks (default: ep_degree)")
    train.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # added by launchers
    train.add_argument("--lifeline", default="", help=argparse.SUPPRESS)  # added by alfb launch
    train.set_defaults(run=_train)


def add_settings(command: argparse.ArgumentParser) -> None:
    """What makes up the configuration of a run, with every command that takes one."""
    command.add_argument("config", nargs="?", type=Path, help="a TOML file, such as configs/demo.toml")
    command.add_argument("--config", dest="config_option", type=Path, metavar="CONFIG", help="the same as an option")
    command.add_argument(
        "--deepspeed_config", "--deepspeed-config", type=Path, metavar="JSON", help="DeepSpeed's configuration file"
    )
    command.add_argument("--deepspeed", action="store_true", help="as DeepSpeed's scripts take it; always on")
    command.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="such as balance.rate=0.001"
    )
    command.add_argument(
        "--profile", action="store_true", help="keep a profiler trace of a few steps in the run folder, and tell"
    )


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """The same settings as words of a command line."""
    words = [str(_path(arguments)), *(word for override in arguments.overrides for word in ("--set", override))]
    if arguments.deepspeed_config:
        words += ["--deepspeed", "--deepspeed_config", str(arguments.deepspeed_config)]
    return [*words, "--profile"] if arguments.profile else words


def read_config(arguments: argparse.Namespace, world_size: int | None = None) -> Config:
    """The configuration that the arguments make up. ConfigError with one line for each thing wrong."""
    return load_config(
        _path(arguments), arguments.overrides, world_size=world_size, deepspeed_json=arguments.deepspeed_config
    )


def _path(arguments: argparse.Namespace) -> Path:
    path: Path | None = arguments.config or arguments.config_option
    if path is None:
        raise ConfigError("no configuration given: alfb train configs/demo.toml")
    return path


def _train(arguments: argparse.Namespace) -> int:
    if arguments.print_config:
        print(config_to_toml(read_config(arguments)), end="")
        return DONE
    if arguments.dry_run:
        return _dry_run(read_config(arguments), arguments.ranks)
    rank, world_size = launched_world()
    lifeline = _connect(arguments.lifeline, rank)
    try:
        code = _run(read_config(arguments, world_size), lifeline, profile=arguments.profile)
    except ConfigError:
        lifeline.send(code=BAD_CONFIG)
        raise
    except Exception:
        lifeline.send(code=FAILED)
        if not lifeline.is_reachable():  # mpirun's daemon on a host that is cut off would wait for it
            for launcher in launchers():
                with contextlib.suppress(psutil.Error):  # another rank has ended it
                    launcher.terminate()
        raise
    lifeline.send(code=code)
    return code


def _run(config: Config, lifeline: ControlClient, *, profile: bool) -> int:
    """The run has ended with this exit code. The process's signals ask it to stop, from here to the process's end."""

    def nothing_to_save() -> None:
        lifeline.send(code=PREEMPTED)
        os._exit(PREEMPTED)

    stop = StopSignals(before_start=nothing_to_save)
    stop.install()
    lifeline.on_stop(stop.request)
    watch(launchers(), stop.request)

    from alfb_dist.training.loop import train

    def started(run: Any) -> None:
        lifeline.send(folder=str(run.folder))
        stop.start()

    return train(config, stop, started, profile=profile)


def _connect(address: str, rank: int) -> ControlClient:
    try:
        return ControlClient(address, rank)
    except OSError as error:
        host, port, _ = address.rsplit(":", 2)
        raise ConfigError(
            f"alfb launch at {host}, port {port}, cannot be reached from here ({error}): give an address that ranks "
            "reach by --launch-host"
        ) from None


def _dry_run(config: Config, ranks: int | None) -> int:
    world_size = max(launched_world()[1], config.parallel.ep_degree) if ranks is None else ranks
    if world_size < 1 or world_size % config.parallel.ep_degree:
        raise ConfigError(
            f"--ranks ({world_size}) must be a multiple of parallel.ep_degree ({config.parallel.ep_degree})"
        )

    from rich.console import Console
    from rich.table import Table

    from alfb_dist.training.estimate import estimate, table_rows

    table = Table("what", "how much", title=f"{config.run.name}: nothing was started")
    for row in table_rows(estimate(config, world_size), world_size, config):
        table.add_row(*row)
    Console().print(table)
    return DONE
