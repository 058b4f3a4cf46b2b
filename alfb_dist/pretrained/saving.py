"""Write a model from the ranks that hold it, as a directory that transformers loads."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alfb_dist.checkpoint import files, optimizer
from alfb_dist.distributed.agreement import on_every_rank
from alfb_dist.distributed.collectives import Group, barrier, group_rank, size, world_group
from alfb_dist.moe.sharded_experts import sharded_experts
from alfb_dist.pretrained.folder import SIDECAR, write_sidecar, write_small_files
from alfb_dist.pretrained.gathering import Part, PieceGatherer, batches
from alfb_dist.pretrained.names import is_bias
from alfb_dist.pretrained.outputs import plan_outputs
from alfb_dist.pretrained.writing import (
    MAX_SHARD_BYTES,
    Shard,
    ShardFile,
    plan_shards,
    publish_folder,
    start_folder,
    temporary_folder,
    write_index,
)


@dataclass(frozen=True)
class _Plan:
    """The content to write: the files, this rank's parts of their tensors, and the biases of the sidecar."""

    model: Any
    shards: list[Shard]
    parts: dict[str, Part]
    extra_biases: dict[str, Tensor]
    dtype: torch.dtype


def save_pretrained(
    model_or_engine: Any,
    path: str | Path,
    *,
    layout: str = "auto",
    masters: bool = False,
    bias_sidecar: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write the model to a directory that `AutoModelForCausalLM.from_pretrained` loads; collective.

    The files are the same to the byte at any expert-parallel degree. Experts are sent one by one to the rank that
    writes a file; no rank holds the whole model. A temporary directory, on a disk that all ranks share, is renamed when
    it is complete. The tokenizer and the generation settings of the directory that the model was loaded from are
    copied. Selection biases are float32.
    model_or_engine: a transformers model, parallelised or not, or the DeepSpeed engine around it, between steps.
    layout: of the experts: "per_expert" as on the hub, "fused" as in the model, "auto" as transformers would write it.
    masters: of an engine, write the optimizer's float32 weights in place of the model's rounded ones.
    bias_sidecar: write selection biases that the family's own model does not have to a file of their own, which this
        package reads and transformers does not; otherwise they are refused unless they are 0.
    overwrite: whether to replace a model in the directory.
    Raises ValueError on every rank if something cannot be saved, OSError naming the path if the disk fails.
    """
    path, group = Path(path), world_group()
    first = group_rank(group) == 0
    plan = on_every_rank(
        lambda: _plan(model_or_engine, layout, masters, bias_sidecar, max_shard_bytes), group, ValueError
    )
    on_every_rank(lambda: start_folder(path, overwrite=overwrite) if first else None, group, ValueError)
    tmp = temporary_folder(path)
    try:
        failure = _write(plan, tmp, group)
        on_every_rank(lambda: _raise(failure), group, OSError)
        on_every_rank(lambda: _finish(plan, path, tmp) if first else None, group, OSError)
    except OSError:
        if first:
            files.remove(tmp)
        barrier(group)  # no rank sees the error before the files are removed
        raise


def _plan(model_or_engine: Any, layout: str, masters: bool, bias_sidecar: bool, max_shard_bytes: int) -> _Plan:
    from transformers import PreTrainedModel

    is_engine = hasattr(model_or_engine, "was_step_applied")
    model = model_or_engine.module if is_engine else model_or_engine
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a transformers model; merge adapters into the model before saving"
        )
    if masters and not is_engine:
        raise ValueError("masters=True writes the optimizer's weights: give the DeepSpeed engine, not its model")
    with torch.device("meta"):
        template = type(model)(copy.deepcopy(model.config))
    tensors = model.state_dict(keep_vars=True)
    extra = _extra_biases(model, tensors, set(template.state_dict()), bias_sidecar)
    expert_names = {f"{name}.{p}" for name, m in sharded_experts(model) for p, _ in m.named_parameters()}
    outputs = plan_outputs(template, expert_names, layout)
    parts = {name: Part(x.detach().contiguous().view(-1)) for name, x in tensors.items()}
    if masters:
        parts |= {n: Part(_to_float32(h.part(h.holder)), h.start) for n, h in optimizer.held(model_or_engine).items()}
    dtypes = {name: part.flat.dtype for name, part in parts.items()}
    if absent := sorted({piece.parameter for x in outputs for piece in x.pieces} - parts.keys()):
        raise ValueError(f"{type(model).__name__} has no {absent[0]}, which its configuration requires")
    weight = next((p for n, p in model.named_parameters() if not is_bias(n)), None)
    dtype = torch.float32 if masters or weight is None else weight.dtype
    return _Plan(model, plan_shards(outputs, dtypes, max_shard_bytes), parts, extra, dtype)


def _to_float32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _extra_biases(model: Any, tensors: dict[str, Tensor], names: set[str], bias_sidecar: bool) -> dict[str, Tensor]:
    """Return the biases, other than 0, that the family's own model, of these names, does not have.

    Raises ValueError if it does not have other tensors, or if there are such biases and no sidecar.
    """
    known = {id(x) for name, x in tensors.items() if name in names}
    extra = {name: x for name, x in tensors.items() if name not in names and id(x) not in known}
    family = type(model).__name__
    if unknown := sorted(name for name in extra if not is_bias(name)):
        raise ValueError(f"transformers' {family} has no {unknown[0]}, so it cannot be saved")
    moved = {name: x.detach().float().cpu().contiguous() for name, x in extra.items() if bool(x.any())}
    if moved and not bias_sidecar:
        raise ValueError(
            f"{family} has no place for a selection bias ({next(iter(moved))}), and transformers routes otherwise "
            f"without it: bias_sidecar=True writes it to {SIDECAR}, which only alfb_dist reads"
        )
    return moved


def _write(plan: _Plan, folder: Path, group: Group) -> Exception | None:
    """Write this rank's files; return the first failure, after which the rank still takes part. Collective."""
    world, rank = size(group), group_rank(group)
    device = next((p.device for p in plan.model.parameters()), torch.device("cpu"))
    gatherer = PieceGatherer(plan.model, plan.parts, group, device)
    widths = {name: part.flat.element_size() for name, part in plan.parts.items()}
    waiting = [[piece for shard in plan.shards[i::world] for piece in shard.pieces] for i in range(world)]
    mine = iter(plan.shards[rank::world])
    file: ShardFile | None = None
    failure: Exception | None = None
    for batch in batches(waiting, widths):
        for data in gatherer.gather(batch):
            if failure is not None:
                continue
            try:
                file = file or ShardFile(folder, next(mine))
                if file.write(data):
                    file = None
            except Exception as e:
                failure = e
    if file is not None:
        file.close()
    return failure


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _finish(plan: _Plan, path: Path, tmp: Path) -> None:
    """Write the other files and rename the directory into place."""
    missing = [shard.name for shard in plan.shards if not (tmp / shard.name).is_file()]
    if missing:
        raise OSError(f"{tmp / missing[0]} is missing on rank 0: write to a disk that all ranks share")
    write_index(tmp, plan.shards)
    origin = Path(plan.model.name_or_path) if plan.model.name_or_path else None
    write_small_files(tmp, plan.model, plan.dtype, origin)
    if plan.extra_biases:
        write_sidecar(tmp, plan.extra_biases)
        warnings.warn(
            f"the selection biases are in {path / SIDECAR}, which transformers does not read: it routes without them",
            stacklevel=6,
        )
    publish_folder(path)
