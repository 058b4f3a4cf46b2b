"""Load a save: all of it is verified and compared with the model on all ranks before anything is changed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from alfb_dist.checkpoint import manifest as manifests
from alfb_dist.checkpoint import optimizer, rng, tensors
from alfb_dist.checkpoint.comparison import compare, saved_kinds
from alfb_dist.checkpoint.folder import newest_good
from alfb_dist.checkpoint.safetensors_file import tensor_bytes, torch_dtype
from alfb_dist.checkpoint.safetensors_reader import SafetensorsReader
from alfb_dist.checkpoint.saving import COUNTERS, between_steps
from alfb_dist.checkpoint.share import STATE, rng_file
from alfb_dist.checkpoint.verification import content_problems, size_problems
from alfb_dist.distributed.agreement import first_ranks, on_every_rank
from alfb_dist.distributed.collectives import Group, broadcast_object, group_rank, size, world_group
from alfb_dist.engine.balancer import Balancer

log = logging.getLogger(__name__)


class SaveReader:
    """Reads tensors of a save by key and checks each against its hash in the manifest."""

    def __init__(self, folder: Path, manifest: manifests.Manifest) -> None:
        self.folder, self.tensors = folder, manifest["tensors"]
        self._readers: dict[str, SafetensorsReader] = {}

    def read(self, key: str) -> Tensor:
        """Return the tensor, on CPU. Raises ValueError naming file and tensor if it is not the one saved."""
        name = self.tensors[key]["file"]
        if name not in self._readers:
            self._readers[name] = SafetensorsReader([self.folder / name])
        tensor = self._readers[name].read(key)
        if xxhash.xxh3_128_hexdigest(tensor_bytes(tensor)) != self.tensors[key]["xxh3_128"]:
            raise ValueError(f"{self.folder / name}: {key} has changed since the save was verified")
        return tensor


def _read_state(path: Path) -> tuple[manifests.Manifest, dict[str, Any]]:
    """Return the manifest and state.json. Raises ValueError if the save is incomplete."""
    manifest = manifests.read(path)
    problems = size_problems(path, manifest) or content_problems(path, [STATE], manifest)
    if problems:
        raise ValueError("; ".join(problems))
    return manifest, json.loads((path / STATE).read_bytes())


def _check_files(path: Path, manifest: manifests.Manifest, group: Group) -> None:
    """Verify this rank's share of the files, every n-th of n ranks. Raises ValueError naming the damaged ones."""
    names = sorted(manifest["files"])[group_rank(group) :: size(group)]
    problems = content_problems(path, names, manifest)
    if problems:
        raise ValueError(f"{'; '.join(problems)}. Load an earlier save (alfb_dist.checkpoint.newest_good finds it)")


def _overlaps(
    engine: Any, held: dict[str, optimizer.Held]
) -> Iterator[tuple[optimizer.Held, tensors.GlobalTensor, int, int]]:
    """Yield each global tensor that this rank holds elements of, with their start and stop in the flat parameter."""
    degree, rank = tensors.ep_degree(engine.module), group_rank(world_group())
    for tensor in tensors.global_tensors(engine.module):
        part = held[tensor.parameter]
        low = max(part.start, tensor.start)
        high = min(part.start + part.numel, tensor.start + tensor.numel)
        if low < high and tensor.position in (None, rank % degree):
            yield part, tensor, low, high


def _steps(numbers: dict[str, Any]) -> float:
    step = numbers.get("step", 0)
    return float(step["value"] if isinstance(step, dict) else step)


def _fill(engine: Any, reader: SaveReader, saved: dict[str, Any]) -> None:
    """Fill this rank's master weights and optimizer states from the save."""
    held = optimizer.held(engine)
    kinds, numbers = saved_kinds(reader.tensors), (saved["optimizer"] or {}).get("numbers", {})
    states: dict[int, dict[str, Tensor]] = {}
    sharing: dict[int, list[str]] = {}
    for name, part in held.items():
        sharing.setdefault(id(part.holder), []).append(name)
    for holder, names in sharing.items():
        part = held[names[0]]
        dtypes = {kind: torch_dtype(dtype) for name in names for kind, dtype in kinds[name].items()}
        dtypes.pop(optimizer.WEIGHT)
        # A flat partition has one count of steps: the highest of its parameters'.
        most = max((numbers.get(name, {}) for name in names), key=_steps)
        zeros = optimizer.set_states(engine, part, dtypes, most)
        states[holder] = {optimizer.WEIGHT: part.holder.detach(), **zeros}
    for part, tensor, low, high in _overlaps(engine, held):
        for kind in kinds[tensor.parameter]:
            whole = reader.read(tensor.key(kind)).view(-1)
            here = part.part(states[id(part.holder)][kind])
            here[low - part.start : high - part.start].copy_(whole[low - tensor.start : high - tensor.start])


def _set_balance(engine: Any, balancer: Balancer, reader: SaveReader, num_steps: int) -> None:
    names = tensors.gate_names(engine.module, balancer)
    for key, buffer in tensors.buffers(engine.module, balancer).items():
        buffer.copy_(reader.read(key))
    balancer.load_state_dict(
        {
            "num_steps": num_steps,
            "bias_LE": torch.stack([reader.read(f"bias/{name}") for name in names]),
            "load_LE": torch.stack([reader.read(f"load/{name}") for name in names]),
        }
    )


def _set_counters(engine: Any, saved: dict[str, Any]) -> None:
    if saved["optimizer"] is None:
        return  # weights alone: the optimizer and its schedule start from the beginning
    for name in COUNTERS:
        setattr(engine, name, saved["counters"][name])
    if engine.micro_steps % engine.gradient_accumulation_steps():
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(saved["scheduler"]["state"])
    names = {id(p): name for name, p in engine.module.named_parameters()}
    optimizer.apply_hyperparameters(optimizer.match_hyperparameters(saved["optimizer"]["groups"], engine, names))
    optimizer.set_loss_scale(engine, saved["loss_scale"])


def _read_random(path: Path, manifest: manifests.Manifest, group: Group) -> dict[str, Any] | None:
    """Return this rank's saved random state; None if the save is of another number of ranks."""
    if manifest["topology"]["world_size"] != size(group):
        return None
    name = rng_file(group_rank(group))
    if problems := content_problems(path, [name], manifest):
        raise ValueError("; ".join(problems))
    state: dict[str, Any] = json.loads((path / name).read_bytes())
    return state


def _set_random(state: dict[str, Any] | None, path: Path, manifest: manifests.Manifest, group: Group) -> None:
    """Restore the random state, or seed it by step and rank if there is none."""
    saved_size, rank = manifest["topology"]["world_size"], group_rank(group)
    if state is not None:
        rng.restore(state)
        return
    rng.seed(manifest["step"], rank, size(group))
    if rank == 0 and saved_size:
        log.warning("%s was saved by %d ranks, not %d: random states are seeded again", path, saved_size, size(group))


def load(engine: Any, balancer: Balancer, path: Path) -> dict[str, Any]:
    """Restore a run from the save at `path` and return the loop's own state; collective.

    With the same number of ranks, EP degree and ZeRO stage, the run continues bit for bit. At others, weights, moments
    and biases are the same bit for bit; random states are seeded again if the number of ranks differs. The optimizer's
    settings (the learning rate among them) become the saved ones. A save of a released model has weights alone and
    leaves the optimizer and its schedule at their start.
    Raises ValueError on every rank, before anything is changed, if the save is damaged, unfinished or of another model,
    optimizer or scheduler, or if an optimizer step is not finished.
    """
    group = world_group()
    manifest, saved = broadcast_object(
        on_every_rank(lambda: _read_state(path) if group_rank(group) == 0 else None, group, ValueError), group
    )
    on_every_rank(lambda: _check_files(path, manifest, group), group, ValueError)
    on_every_rank(lambda: compare(engine, balancer, manifest, saved), group, ValueError)
    on_every_rank(lambda: between_steps(balancer), group, ValueError)
    random = on_every_rank(lambda: _read_random(path, manifest, group), group, ValueError)

    def change() -> None:
        reader = SaveReader(path, manifest)
        with torch.no_grad():
            _fill(engine, reader, saved)
            _set_counters(engine, saved)
            _set_balance(engine, balancer, reader, saved["balancer"]["num_steps"])

    on_every_rank(change, group, RuntimeError)
    optimizer.refresh_model(engine)
    on_every_rank(lambda: _set_random(random, path, manifest, group), group, RuntimeError)
    state: dict[str, Any] = saved["state"]
    return state


def agree_on_newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return what `newest_good` finds on rank 0, on every rank; collective."""
    return first_ranks(lambda: newest_good(folder), world_group(), OSError)
