"""`alfb train`: train a model, or print what a run would be."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

import psutil

from alfb_dist.config import Config, ConfigError, config_to_toml, load_config
from alfb_dist.distributed.launch.control_channel import ControlClient
from alfb_dist.distributed.launch.parents import launchers, watch
from alfb_dist.distributed.launch.signals import BAD_CONFIG, DONE, FAILED, PREEMPTED, StopSignals
from alfb_dist.distributed.rendezvous import launched_world


def add(commands: Any) -> None:
    """Add `alfb train` to the commands."""
    train = commands.add_parser(
        "train",
        help="train a model in this process, or in each that a launcher starts",
        description="Train a model. Started by deepspeed, torchrun, mpirun or srun, this process is one rank of the "
        "run; otherwise it is the only one.",
    )
    add_config_options(train)
    train.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    train.add_argument("--dry-run", action="store_true", help="print sizes, memory and bytes exchanged, and exit")
    train.add_argument(
        "--ranks", type=int, metavar="N", help="number of ranks for --dry-run (default: parallel.ep_degree)"
    )
    train.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # added by launchers
    train.add_argument("--lifeline", default="", help=argparse.SUPPRESS)  # added by alfb launch
    train.set_defaults(run=_train)


def add_config_options(command: argparse.ArgumentParser) -> None:
    """Add the options that make up the configuration of a run."""
    command.add_argument("config", nargs="?", type=Path, help="configuration file, such as configs/demo.toml")
    command.add_argument(
        "--config", dest="config_option", type=Path, metavar="CONFIG", help="the same, given as an option"
    )
    command.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        type=Path,
        metavar="JSON",
        help="DeepSpeed configuration to merge in",
    )
    command.add_argument("--deepspeed", action="store_true", help="accepted as in DeepSpeed's own scripts; always on")
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, such as balance.rate=0.001; may be repeated",
    )
    command.add_argument(
        "--profile", action="store_true", help="trace a few steps with torch's profiler and show where their time goes"
    )


def config_words(arguments: argparse.Namespace) -> list[str]:
    """Return the words of a command line that make up the same configuration."""
    words = [str(_path(arguments)), *(word for override in arguments.overrides for word in ("--set", override))]
    if arguments.deepspeed_config:
        words += ["--deepspeed", "--deepspeed_config", str(arguments.deepspeed_config)]
    return [*words, "--profile"] if arguments.profile else words


def read_config(arguments: argparse.Namespace, world_size: int | None = None) -> Config:
    """Return the configuration that the arguments make up. Raises ConfigError with one line per problem."""
    return load_config(
        _path(arguments), arguments.overrides, world_size=world_size, deepspeed_json=arguments.deepspeed_config
    )


def _path(arguments: argparse.Namespace) -> Path:
    path: Path | None = arguments.config or arguments.config_option
    if path is None:
        raise ConfigError("no configuration given; an example: alfb train configs/demo.toml")
    return path


def _train(arguments: argparse.Namespace) -> int:
    if arguments.print_config:
        print(config_to_toml(read_config(arguments)), end="")
        return DONE
    if arguments.dry_run:
        return _dry_run(read_config(arguments), arguments.ranks)
    rank, world_size = launched_world()
    control = _connect(arguments.lifeline, rank)
    try:
        code = _run(read_config(arguments, world_size), control, profile=arguments.profile)
    except ConfigError:
        control.send(code=BAD_CONFIG)
        raise
    except Exception:
        control.send(code=FAILED)
        if not control.is_reachable():  # mpirun's daemon on a host that is cut off would wait for it
            for launcher in launchers():
                with contextlib.suppress(psutil.Error):  # another rank has ended it
                    launcher.terminate()
        raise
    control.send(code=code)
    return code


def _run(config: Config, control: ControlClient, *, profile: bool) -> int:
    """Run the training and return its exit code. From here on, signals to this process ask the run to stop."""

    def nothing_to_save() -> None:
        control.send(code=PREEMPTED)
        os._exit(PREEMPTED)

    stop = StopSignals(before_start=nothing_to_save)
    stop.install()
    control.on_stop(stop.request)
    watch(launchers(), stop.request)

    from alfb_dist.training.loop import train

    def started(run: Any) -> None:
        control.send(folder=str(run.folder))
        stop.start()

    return train(config, stop, started, profile=profile)


def _connect(address: str, rank: int) -> ControlClient:
    try:
        return ControlClient(address, rank)
    except OSError as error:
        host, port, _ = address.rsplit(":", 2)
        raise ConfigError(
            f"alfb launch at {host}, port {port}, cannot be reached from here ({error}): set --launch-host "
            "to an address that the ranks can reach"
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

    table = Table("quantity", "value", title=f"{config.run.name}: dry run")
    for row in table_rows(estimate(config, world_size), world_size, config):
        table.add_row(*row)
    Console().print(table)
    return DONE
