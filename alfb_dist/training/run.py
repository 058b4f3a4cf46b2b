"""A training run: all its parts are built in order, and resumed from a checkpoint if asked."""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from alfb_dist import checkpoint
from alfb_dist.config import Config, ConfigError
from alfb_dist.config.provenance import differences, facts
from alfb_dist.data import Batches, PreparedData, TokenFile, prepare, unigram_entropy
from alfb_dist.distributed.agreement import first_ranks, on_every_rank
from alfb_dist.distributed.collectives import known_groups, set_timeouts, share_objects
from alfb_dist.distributed.liveness import Peer, Peers
from alfb_dist.distributed.network import INTERFACE_VARIABLES
from alfb_dist.distributed.placement import check_placement, grid_rows
from alfb_dist.distributed.topology import init_distributed
from alfb_dist.engine.balancer import Balancer
from alfb_dist.engine.ds_config import derive_ds_config, lr_schedule
from alfb_dist.engine.initialize import quiet, start_engine
from alfb_dist.moe.families.blocks import moe_blocks
from alfb_dist.pretrained.importing import RELEASED
from alfb_dist.report import NullReporter, Reporter
from alfb_dist.report.console import print_table
from alfb_dist.training.model import build_model, count_parameters, parameter_groups, transformers_config
from alfb_dist.training.run_folder import (
    changed_settings,
    describe_run,
    flat_settings,
    last_run_folder,
    new_run_folder,
    write_config,
)
from alfb_dist.training.settings import balancing_of, sharding_of, start_patience


@dataclass
class Run:
    """The parts of a training run."""

    config: Config
    folder: Path
    engine: Any
    balancer: Balancer
    train_batches: Batches
    validation_batches: Batches
    device: torch.device
    group: ProcessGroup
    reporter: Reporter | NullReporter
    peers: Peers
    first_step: int = 0
    tokens: int = 0
    skipped_in_a_row: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    """What the report shows at the end. Checkpoints keep it."""
    messages: list[str] = field(default_factory=list)
    """Shown when the run starts."""

    @property
    def slot(self) -> tuple[int, int, int]:
        """(rank, world size, micro-batch size), which decide on the rank's samples."""
        return self.group.rank(), self.group.size(), self.config.train.micro_batch


def start(config: Config) -> Run:
    """Build the run, at its first step or at its newest good checkpoint; collective.

    Raises ConfigError on every rank if ranks differ in versions, configuration or data.
    """
    device = init_distributed(timeout_seconds=start_patience(config), interface=config.run.interface)
    quiet()
    group = dist.group.WORLD
    assert group is not None
    peers = _meet(config, group)
    with peers.watch():
        run = _build(config, device, group, peers)
        set_timeouts(config.run.timeout_seconds, known_groups())
    return run


def _hosts(peers: Peers) -> list[str]:
    """Return the host of each rank, in rank order, with its address if several hosts have the name."""
    everyone = sorted((peers.me, *peers.others), key=lambda peer: peer.rank)
    addresses = {name: {p.address[0] for p in everyone if p.host == name} for name in {p.host for p in everyone}}
    return [p.host if len(addresses[p.host]) == 1 else f"{p.host} ({p.address[0]})" for p in everyone]


def _meet(config: Config, group: ProcessGroup) -> Peers:
    """Connect the ranks. Raises ConfigError on every rank if versions, sources or settings differ."""
    peers = Peers(group.rank())
    everyone = share_objects((peers.me, {**facts(), **flat_settings(config)}), group)
    _refuse_differences(everyone, "make it the same on every host")
    peers.meet([peer for peer, _ in everyone])
    return peers


def _refuse_differences(facts_by_peer: list[tuple[Peer, dict[str, Any]]], fix: str) -> None:
    found = differences([(peer.place, facts) for peer, facts in facts_by_peer], fix)
    if found:
        raise ConfigError("\n".join(found))


def _build(config: Config, device: torch.device, group: ProcessGroup, peers: Peers) -> Run:
    hosts = _hosts(peers)
    misplaced = check_placement(hosts, config.parallel.ep_degree, config.parallel.expert_placement)
    prepared = first_ranks(lambda: _prepare(config), group, ConfigError)
    train_batches, validation_batches = on_every_rank(lambda: _open_data(config, prepared), group, ConfigError)
    _compare_data(peers, (train_batches, validation_batches), group)
    folder = first_ranks(lambda: _choose_folder(config), group, ConfigError)
    _check_shared(folder, group)
    newest, damaged = _newest(config, folder)
    model = build_model(config, resumed=newest is not None)
    num_parameters = count_parameters(model)
    layer_names = [block.name for block in moe_blocks(model)]
    engine, balancer = start_engine(
        model,
        derive_ds_config(config, group.size()),
        sharding_of(config),
        balancing_of(config),
        model_parameters=lambda sharded: parameter_groups(sharded, config.optimizer.weight_decay),
        lr_scheduler=lr_schedule(config),
    )
    run = Run(config, folder, engine, balancer, train_batches, validation_batches, device, group, NullReporter(), peers)
    _resume(run, newest, damaged)
    released = config.model.path or run.summary.get(RELEASED)
    if released and config.balance.mode == "auto":
        balancer.modes = ["freeze"] * len(balancer.modes)
        run.messages.append(
            f'the biases of {released} stay as released (balance.mode = "auto"): '
            "set balance.mode to train or recentre to keep the experts balanced in further training"
        )
    run.messages += [misplaced] if misplaced else []
    _show_grid(run, hosts)
    on_every_rank(lambda: _open_report(run, num_parameters, layer_names), group, OSError)
    return run


def _choose_folder(config: Config) -> Path:
    parent = Path(config.run.folder)
    found = last_run_folder(parent, config.run.name) if config.run.resume else None
    return found or new_run_folder(parent, config.run.name)


def _prepare(config: Config) -> PreparedData:
    data = config.data
    return prepare(
        data.source,
        data.cache,
        tokenizer=data.tokenizer,
        end_token=data.end_token or None,
        validation_fraction=data.validation_fraction,
        validation_sources=data.validation_source,
        progress=config.report.progress,
    )


def _open_data(config: Config, prepared: PreparedData) -> tuple[Batches, Batches]:
    data, files = config.data, (TokenFile(prepared.train), TokenFile(prepared.validation))
    vocab_size = getattr(transformers_config(config.model), "vocab_size", None)
    if isinstance(vocab_size, int) and files[0].vocab_size > vocab_size:
        where = f"vocab_size of {config.model.path}" if config.model.path else "model.config.vocab_size"
        raise ConfigError(f"{where} ({vocab_size}) must be at least the tokenizer's ({files[0].vocab_size})")
    train_batches, validation_batches = (
        Batches(file, data.sequence_length, data.layout, seed=config.run.seed) for file in files
    )
    return train_batches, validation_batches


def _compare_data(peers: Peers, data: tuple[Batches, Batches], group: ProcessGroup) -> None:
    """Raise ConfigError on every rank if the hosts' token files differ."""
    files = {str(batches.token_file.path): batches.token_file.fingerprint for batches in data}
    everyone = share_objects((peers.me, files), group)
    _refuse_differences(everyone, "copy the first host's file, or put data.cache where every host sees it")


def _check_shared(folder: Path, group: ProcessGroup) -> None:
    """Raise ConfigError on every rank if a rank does not see a file that the first one writes to the run directory."""
    mark = first_ranks(lambda: Path(tempfile.mkstemp(prefix=".seen-", dir=folder)[1]), group, OSError)

    def look() -> None:
        if not mark.exists():
            raise ConfigError(
                f"{socket.gethostname()} does not see what the first rank writes to {folder.absolute()}: "
                "put run.folder on a file system that all hosts share"
            )

    try:
        on_every_rank(look, group, ConfigError)
    finally:
        if group.rank() == 0:
            mark.unlink()


def _newest(config: Config, folder: Path) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from, if any, and the damaged ones that are skipped, with reasons.

    Raises ConfigError if all are damaged.
    """
    path, damaged = checkpoint.agree_on_newest(folder / "checkpoints") if config.run.resume else (None, [])
    if path is None and damaged:
        raise ConfigError(
            f"run.resume: no checkpoint of {folder} is whole ({'; '.join(damaged)}): "
            "restore or remove them, or start a new run with run.resume=false"
        )
    return path, damaged


def _resume(run: Run, path: Path | None, damaged: list[str]) -> None:
    if not run.config.run.resume:
        return
    if path is None:
        run.messages.append("nothing to resume from: the run starts at its first step")
    run.messages += [f"skipped a damaged checkpoint: {reason}" for reason in damaged]
    if path is not None:
        state = checkpoint.load(run.engine, run.balancer, path)
        run.first_step, run.tokens, run.summary = state["step"], state["tokens"], state["summary"]
        run.messages.append(f"resumed from {path.name}")
        if run.first_step == 0 and RELEASED in run.summary:
            run.balancer.start_from(run.balancer.bias_LE)  # a released model starts: `recentre` happens now
            return
        run.messages += first_ranks(lambda: changed_settings(run.folder, run.config), run.group, OSError)


def _open_report(run: Run, num_parameters: int, layer_names: list[str]) -> None:
    """Write config.json and open the reporter, on the first rank."""
    if run.group.rank() != 0:
        return
    config, report = run.config, run.config.report
    run.summary["unigram_entropy"] = unigram_entropy(run.train_batches.token_file)
    description = describe_run(
        config,
        world_size=run.group.size(),
        num_parameters=num_parameters,
        layer_names=layer_names,
        unigram_entropy=run.summary["unigram_entropy"],
    )
    write_config(run.folder, description)
    run.reporter = Reporter(
        run.folder,
        total_steps=config.train.steps,
        first_step=run.first_step,
        config=description,
        progress=report.progress,
        wandb=report.wandb,
        wandb_project=report.wandb_project,
        run_name=run.folder.name,
        layer_names=layer_names,
        html=report.html,
    )
    for message in run.messages:
        run.reporter.message(message)


def _show_grid(run: Run, hosts: list[str]) -> None:
    """Print a small table of hosts, ranks and experts, on the first rank."""
    if run.group.rank() == 0 and run.group.size() > 1:
        rows = grid_rows(hosts, run.config.parallel.ep_degree, run.balancer.bias_LE.shape[-1])
        interface = os.environ.get(INTERFACE_VARIABLES[0])
        title = f"{run.group.size()} ranks" + (f", exchanging over {interface}" if interface else "")
        print_table(title, ("host", "rank", "expert-parallel group", "experts"), rows)
