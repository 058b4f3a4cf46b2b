"""Writing a save: all ranks write their share aside, agree that all of it is on the disk, and it becomes visible."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from alfb_dist.checkpoint import files, manifest, optimizer, tensors
from alfb_dist.checkpoint.folder import SaveError, prune, publish, start
from alfb_dist.checkpoint.folder_names import aside, step_folder
from alfb_dist.checkpoint.gathering import Gatherer, Request
from alfb_dist.checkpoint.safetensors_file import dtype_name
from alfb_dist.checkpoint.share import Share
from alfb_dist.checkpoint.write_order import batches, items
from alfb_dist.config.provenance import versions
from alfb_dist.distributed.agreement import on_every_rank
from alfb_dist.distributed.collectives import Group, all_equal, barrier, gather_objects, group_rank, size, world_group
from alfb_dist.engine.balancer import Balancer

log = logging.getLogger(__name__)

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def _small_state(engine: Any, balancer: Balancer, held: dict[str, optimizer.Held], state: Any) -> dict[str, Any]:
    """Everything beside tensors and random state that a resumed run needs, as JSON."""
    names = {id(part.parameter): name for name, part in held.items()}
    scheduler = engine.lr_scheduler
    small = {
        "state": state,
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "balancer": {"num_steps": balancer.num_steps},
        "optimizer": {
            "name": type(optimizer.base_optimizer(engine)).__name__,
            "groups": optimizer.hyperparameters(engine, names),
            "numbers": {name: optimizer.numbers(engine, part) for name, part in held.items()},
        },
        "scheduler": None if scheduler is None else {"name": type(scheduler).__name__, "state": scheduler.state_dict()},
        "loss_scale": optimizer.loss_scale(engine),
    }
    try:
        json.dumps(small)
    except TypeError as e:
        raise ValueError(f"the state and the scheduler's state must be plain JSON: {e}") from e
    return small


@dataclass(frozen=True)
class _Content:
    """What is to be saved: what this rank holds, the types of it, the balance and the small state."""

    held: dict[str, optimizer.Held]
    kinds: dict[str, dict[str, str]]
    """By parameter, the format's name of the type of each kind of tensor there is of it."""
    balance: dict[str, torch.Tensor]
    small: dict[str, Any]


def _content(engine: Any, balancer: Balancer, state: dict[str, Any]) -> _Content:
    """What is to be saved; ValueError if something cannot be."""
    between_steps(balancer)
    held = optimizer.held(engine)
    optimizer.check_masters(held)
    kinds = {n: {k: dtype_name(x.dtype) for k, x in optimizer.elementwise(engine, p).items()} for n, p in held.items()}
    balance = tensors.balance_tensors(engine.module, balancer) | tensors.buffers(engine.module, balancer)
    for buffer in balance.values():
        dtype_name(buffer.dtype)
    return _Content(held, kinds, balance, _small_state(engine, balancer, held, state))


def between_steps(balancer: Balancer) -> None:
    """Nothing, or ValueError if there are loads that `balancer.step()` has not yet seen."""
    if any(gate.pending_load_E is not None for gate in balancer.gates):
        raise ValueError("save and load between optimizer steps, after balancer.step(), which has not seen all loads")


def _body(engine: Any, step: int, state: dict[str, Any], shares: list[Any]) -> dict[str, Any]:
    """The manifest of the save that these shares are. RuntimeError if two ranks wrote the same."""
    written_files: dict[str, Any] = {}
    written: dict[str, Any] = {}
    for share_files, share_tensors in shares:
        written_files |= share_files
        written |= share_tensors
    if len(written) != sum(len(share_tensors) for _, share_tensors in shares):
        raise RuntimeError("two ranks wrote the same tensor")
    model = engine.module
    topology = {
        "world_size": len(shares),
        "ep_degree": tensors.ep_degree(model),
        "zero_stage": engine.zero_optimization_stage(),
    }
    return manifest.make(
        step=step,
        topology=topology,
        config_hash=state.get("config_hash"),
        versions=versions(),
        files=written_files,
        tensors=written,
        num_experts=tensors.num_experts(model),
    )


def _publish(path: Path, engine: Any, step: int, state: dict[str, Any], shares: list[Any]) -> bool:
    """The save is finished: its manifest is written and it has its name."""
    tmp, body = aside(path), _body(engine, step, state, shares)
    for name, record in body["files"].items():
        file = tmp / name
        if not file.is_file() or file.stat().st_size != record["bytes"]:
            raise OSError(f"{file} is not as it was written: the checkpoints must be on a disk that all ranks share")
    files.write_file(tmp / manifest.NAME, manifest.encode(body))
    publish(path)
    return True


def _check_equal(value: Any, engine: Any, group: Group) -> None:
    """Nothing, or RuntimeError on every rank if they do not have the same; collective."""
    digest = torch.frombuffer(bytearray(xxhash.xxh3_128_digest(manifest.to_json(value).encode())), dtype=torch.uint8)
    if not all_equal(digest.to(engine.device), group):
        raise RuntimeError("ranks differ in which optimizer states they keep or in their step counts")


def _write(engine: Any, content: _Content, folder: Path, group: Group) -> Share:
    """Write this rank's share of the tensors, as far as the disk allows; collective."""
    model, rank, held = engine.module, group_rank(group), content.held
    degree, found = tensors.ep_degree(model), tensors.global_tensors(model)
    todo = items(found, tensors.writers(found, degree, size(group)), content.kinds)
    share = Share(folder, rank, [item.entry for item in todo if item.writer == rank])

    def read(request: Request, start: int, stop: int) -> torch.Tensor:
        part = held[request.parameter]
        flat = part.part(optimizer.elementwise(engine, part)[request.kind])
        return flat[start - part.start : stop - part.start]

    spans = {name: (part.start, part.start + part.numel) for name, part in held.items() if part.numel}
    gatherer = Gatherer(spans, read, degree, group, engine.device)
    for batch in batches(todo, size(group)):
        gathered = gatherer.gather([item.request() for item in batch])
        for item, data in zip((item for item in batch if item.writer == rank), gathered, strict=True):
            share.put(item.entry.key, data)
    return share


def save(
    engine: Any, balancer: Balancer, folder: Path, *, step: int, state: dict[str, Any], keep: int | None = None
) -> Path:
    """The run can go on from here after anything that may happen: its state is in the folder returned; collective.

    folder: the run's checkpoints/, on a disk that all ranks share. step: names the save; a save of the same step is
    replaced. state: plain JSON for the loop itself, returned by `load`; its `config_hash`, if any, is in the manifest.
    keep: at most so many saves are left, this one among them.
    Raises, on every rank alike, SaveError naming path and bytes if the disk fails (what was written is removed, earlier
    saves stay and training can go on), ValueError if called amid an optimizer step or for a state that cannot be saved.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    group = world_group()
    first, path = group_rank(group) == 0, step_folder(folder, step)
    content = on_every_rank(lambda: _content(engine, balancer, state), group, ValueError)
    _check_equal([content.kinds, content.small["optimizer"]], engine, group)
    on_every_rank(lambda: start(path) if first else None, group, SaveError)
    try:
        share = _write(engine, content, aside(path), group)
        on_every_rank(lambda: share.finish(content.small, content.balance), group, SaveError)
        shares = gather_objects((share.files, share.tensors), group)
        on_every_rank(lambda: _publish(path, engine, step, state, shares) if shares else None, group, SaveError)
    except SaveError:
        if first:
            files.remove(aside(path))
        barrier(group)  # where an error is seen, what was written is gone
        raise
    if keep is not None and first:
        try:
            prune(folder, keep, known_good=path)
        except OSError as e:
            log.warning("old saves in %s could not be removed: %s", folder, e)
    return path
