"""Write a save: all ranks write their share to a temporary directory and agree that it is complete; one renames it."""

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
from alfb_dist.checkpoint.folder_names import step_folder, temporary
from alfb_dist.checkpoint.gathering import Gatherer, Request
from alfb_dist.checkpoint.safetensors_file import dtype_name
from alfb_dist.checkpoint.share import Share
from alfb_dist.checkpoint.write_order import batches, items
from alfb_dist.config.provenance import SAVE, versions
from alfb_dist.distributed.agreement import on_every_rank
from alfb_dist.distributed.collectives import Group, all_equal, barrier, gather_objects, group_rank, size, world_group
from alfb_dist.engine.balancer import Balancer

log = logging.getLogger(__name__)

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def _json_state(engine: Any, balancer: Balancer, held: dict[str, optimizer.Held], state: Any) -> dict[str, Any]:
    """Return what a resumed run needs besides tensors and random state, as JSON."""
    names = {id(part.parameter): name for name, part in held.items()}
    scheduler = engine.lr_scheduler
    values = {
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
        json.dumps(values)
    except TypeError as e:
        raise ValueError(f"state and the scheduler's state must be plain JSON: {e}") from e
    return values


@dataclass(frozen=True)
class _Content:
    """The content of a save: the parts that this rank holds, their types, biases and loads, and state.json."""

    held: dict[str, optimizer.Held]
    kinds: dict[str, dict[str, str]]
    """By parameter, the format's name of the type of each kind of tensor it has."""
    balance: dict[str, torch.Tensor]
    state: dict[str, Any]


def _content(engine: Any, balancer: Balancer, state: dict[str, Any]) -> _Content:
    """Return the content of a save. Raises ValueError if something cannot be saved."""
    between_steps(balancer)
    held = optimizer.held(engine)
    optimizer.check_masters(held)
    kinds = {n: {k: dtype_name(x.dtype) for k, x in optimizer.elementwise(engine, p).items()} for n, p in held.items()}
    balance = tensors.balance_tensors(engine.module, balancer) | tensors.buffers(engine.module, balancer)
    for buffer in balance.values():
        dtype_name(buffer.dtype)
    return _Content(held, kinds, balance, _json_state(engine, balancer, held, state))


def between_steps(balancer: Balancer) -> None:
    """Raise ValueError if there are loads that `balancer.step()` has not yet reduced."""
    if any(gate.pending_load_E is not None for gate in balancer.gates):
        raise ValueError(
            "save and load between optimizer steps: call balancer.step() first, some loads are still pending"
        )


def _body(engine: Any, step: int, state: dict[str, Any], shares: list[Any]) -> dict[str, Any]:
    """Return the manifest of these shares. Raises RuntimeError if two ranks wrote the same tensor."""
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
        versions=versions(SAVE),
        files=written_files,
        tensors=written,
        num_experts=tensors.num_experts(model),
    )


def _publish(path: Path, engine: Any, step: int, state: dict[str, Any], shares: list[Any]) -> bool:
    """Write the manifest and rename the save into place; return True."""
    tmp, body = temporary(path), _body(engine, step, state, shares)
    for name, record in body["files"].items():
        file = tmp / name
        if not file.is_file() or file.stat().st_size != record["bytes"]:
            raise OSError(f"{file} is not as it was written: put the checkpoints on a disk that all ranks share")
    files.write_file(tmp / manifest.NAME, manifest.encode(body))
    publish(path)
    return True


def _check_equal(value: Any, engine: Any, group: Group) -> None:
    """Raise RuntimeError on every rank if their values differ; collective."""
    digest = torch.frombuffer(bytearray(xxhash.xxh3_128_digest(manifest.to_json(value).encode())), dtype=torch.uint8)
    if not all_equal(digest.to(engine.device), group):
        raise RuntimeError("ranks differ in the kinds of their optimizer states or in their step counts")


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
            share.add(item.entry.key, data)
    return share


def save(
    engine: Any, balancer: Balancer, folder: Path, *, step: int, state: dict[str, Any], keep: int | None = None
) -> Path:
    """Save the state of a run; return the save's directory; collective.

    folder: the run's checkpoints/, on a disk that all ranks share. step: names the save; a save of the same step is
    replaced. state: plain JSON for the loop itself, returned by `load`; its `config_hash`, if any, is in the manifest.
    keep: the number of saves to keep, this one included; None keeps all.
    Raises, on every rank, SaveError naming path and byte if the disk fails (what was written is removed, earlier saves
    stay and training can go on); ValueError if an optimizer step is not finished or something cannot be saved.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    group = world_group()
    first, path = group_rank(group) == 0, step_folder(folder, step)
    content = on_every_rank(lambda: _content(engine, balancer, state), group, ValueError)
    _check_equal([content.kinds, content.state["optimizer"]], engine, group)
    on_every_rank(lambda: start(path) if first else None, group, SaveError)
    try:
        share = _write(engine, content, temporary(path), group)
        on_every_rank(lambda: share.finish(content.state, content.balance), group, SaveError)
        shares = gather_objects((share.files, share.tensors), group)
        on_every_rank(lambda: _publish(path, engine, step, state, shares) if shares else None, group, SaveError)
    except SaveError:
        if first:
            files.remove(temporary(path))
        barrier(group)  # no rank sees the error before the files are removed
        raise
    if keep is not None and first:
        try:
            prune(folder, keep, known_good=path)
        except OSError as e:
            log.warning("old saves in %s could not be removed: %s", folder, e)
    return path
