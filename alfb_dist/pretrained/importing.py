"""A released model as the save of step 0 of a run: weights and biases, and no optimizer yet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alfb_dist.checkpoint import files, manifest
from alfb_dist.checkpoint.folder import publish, start, step_folder
from alfb_dist.checkpoint.safetensors_file import Entry, dtype_name
from alfb_dist.checkpoint.saving import COUNTERS
from alfb_dist.checkpoint.share import Share
from alfb_dist.config.provenance import versions
from alfb_dist.config.tables import ModelConfig
from alfb_dist.moe.families.blocks import moe_blocks, num_choices
from alfb_dist.pretrained.fp8 import QUANTIZED
from alfb_dist.pretrained.loading import homeless_biases, open_model
from alfb_dist.pretrained.names import expert_counts, is_bias, shapes_of
from alfb_dist.pretrained.weights import ModelWeights

RELEASED = "released"
"""Key of a run's summary: the folder of the released model that its step 0 is."""


@dataclass(frozen=True)
class _Item:
    """A tensor of the save: its entry, and where its values are from."""

    entry: Entry
    name: str
    expert: int | None

    def read(self, weights: ModelWeights) -> Tensor:
        """Its values, in the type of the entry's name."""
        dtype = _dtype(weights, self.name)
        x = torch.empty(self.entry.shape, dtype=dtype)
        weights.fill(x if self.expert is None else x[None], self.name, self.expert or 0)
        return x


def from_hf(folder: Path, run_folder: Path) -> Path:
    """The model of a transformers folder is the save of step 0 of a new run folder, whose path is returned.

    A run goes on from it with run.resume; its optimizer starts anew. Everything in the save is under a hash. Tensors
    keep their types, but for biases, which are float32, and weights in 8 or 4 bits, which become float32. One process,
    tensor by tensor. ValueError, before anything is written, where `from_pretrained` would raise one, or if the run
    folder holds something; OSError naming the path if the disk fails.
    """
    if run_folder.exists() and (not run_folder.is_dir() or any(run_folder.iterdir())):
        raise ValueError(f"{run_folder} is not empty: give a new run folder, such as runs/{folder.name}")
    template, weights, dtype = open_model(folder)
    balance = _balance(template, weights, homeless_biases(folder, weights))
    items = sorted(_items(template, weights), key=lambda item: -_dtype(weights, item.name).itemsize)
    path = step_folder(run_folder / "checkpoints", 0)
    tmp = start(path)
    try:
        share = Share(tmp, 0, [item.entry for item in items])
        for item in items:
            share.add(item.entry.key, item.read(weights))
        share.finish(_state(folder), balance)
        body = manifest.make(
            step=0,
            topology={"world_size": 0, "ep_degree": 1, "zero_stage": 0},
            config_hash=None,
            versions=versions(),
            files=share.files,
            tensors=share.tensors,
            num_experts={name.rpartition(".")[0]: count for name, count in expert_counts(template).items()},
        )
        files.write_file(tmp / manifest.NAME, manifest.encode(body))
        model = ModelConfig(
            path=str(folder.resolve()), dtype="bfloat16" if dtype == torch.bfloat16 else "float32"
        ).model_dump(mode="json")
        files.write_file(run_folder / "config.json", json.dumps({"config": {"model": model}}, indent=1).encode())
        publish(path)
    except BaseException:
        files.remove(tmp)
        files.remove(run_folder)  # it was empty before
        raise
    return path


def _state(folder: Path) -> dict[str, Any]:
    """What a run finds in the save beside tensors."""
    return {
        "state": {"step": 0, "tokens": 0, "summary": {RELEASED: str(folder.resolve())}},
        "counters": dict.fromkeys(COUNTERS, 0),
        "balancer": {"num_steps": 0},
        "optimizer": None,
        "scheduler": None,
        "loss_scale": None,
    }


def _dtype(weights: ModelWeights, name: str) -> torch.dtype:
    stored = weights.dtype(name)
    return torch.float32 if stored in QUANTIZED else stored


def _items(template: Any, weights: ModelWeights) -> Iterator[_Item]:
    """Every tensor but the biases and other buffers, experts one by one."""
    counts, parameters = expert_counts(template), {name for name, _ in template.named_parameters()}
    for name, shape in shapes_of(template).items():
        if name in parameters and not is_bias(name):
            dtype = dtype_name(_dtype(weights, name))
            if name not in counts:
                yield _Item(Entry(f"weight/{name}", dtype, shape), name, None)
            for expert in range(counts.get(name, 0)):
                yield _Item(Entry(f"weight/{name}/{expert}", dtype, shape[1:]), name, expert)


def _balance(template: Any, weights: ModelWeights, homeless: dict[str, Tensor]) -> dict[str, Tensor]:
    """Biases, loads of 0, and other buffers that the state dict holds, by key."""
    found, names = {}, {id(module): name for name, module in template.named_modules()}
    for block in moe_blocks(template):
        name = f"{names[id(block.holder)]}.{block.bias_name}"
        bias = torch.zeros(num_choices(block.gate, getattr(block.holder, block.bias_name, None)))
        if name in weights.names and not block.added:
            weights.fill(bias.view(shapes_of(template)[name]), name)
        found[f"bias/{name}"] = homeless.get(name, bias)
        found[f"load/{name}"] = torch.zeros(bias.shape, dtype=torch.int64)
    parameters = {name for name, _ in template.named_parameters()}
    for name, shape in shapes_of(template).items():
        if name not in parameters and not is_bias(name):
            found[f"buffer/{name}"] = torch.empty(shape, dtype=weights.dtype(name))
            weights.fill(found[f"buffer/{name}"], name)
    return found
