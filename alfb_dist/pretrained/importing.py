"""Convert a released model to the save of step 0 of a run: weights and biases, without an optimizer."""

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
from alfb_dist.config.provenance import SAVE, versions
from alfb_dist.config.tables import ModelConfig
from alfb_dist.moe.families.blocks import moe_blocks, num_choices
from alfb_dist.pretrained.fp8 import QUANTIZED
from alfb_dist.pretrained.loading import extra_biases, open_model
from alfb_dist.pretrained.names import expert_counts, is_bias, shapes_of
from alfb_dist.pretrained.weights import ModelWeights

RELEASED = "released"
"""Key of a run's summary: the directory of the released model that it started from."""


@dataclass(frozen=True)
class _Item:
    """A tensor of the save: its entry, and the name and expert in the model."""

    entry: Entry
    name: str
    expert: int | None

    def read(self, weights: ModelWeights) -> Tensor:
        """Return its values in the entry's type."""
        dtype = _dtype(weights, self.name)
        x = torch.empty(self.entry.shape, dtype=dtype)
        weights.fill(x if self.expert is None else x[None], self.name, self.expert or 0)
        return x


def from_hf(folder: Path, run_folder: Path) -> Path:
    """Write the model of a transformers directory as the save of step 0 of a new run; return the save's directory.

    A run continues from it with run.resume and a new optimizer. Tensors keep their types, except biases and weights in
    8 or 4 bits, which become float32. Runs in one process, tensor by tensor.
    Raises ValueError, before anything is written, as `from_pretrained` does or if the run's directory is not empty;
    OSError naming the path if the disk fails.
    """
    if run_folder.exists() and (not run_folder.is_dir() or any(run_folder.iterdir())):
        raise ValueError(f"{run_folder} is not empty: give a new run directory, such as runs/{folder.name}")
    template, weights, dtype = open_model(folder)
    balance = _balance(template, weights, extra_biases(folder, weights))
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
            versions=versions(SAVE),
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
    """Return the content of state.json."""
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
    """Yield every parameter except the biases, experts one by one."""
    counts, parameters = expert_counts(template), {name for name, _ in template.named_parameters()}
    for name, shape in shapes_of(template).items():
        if name in parameters and not is_bias(name):
            dtype = dtype_name(_dtype(weights, name))
            if name not in counts:
                yield _Item(Entry(f"weight/{name}", dtype, shape), name, None)
            for expert in range(counts.get(name, 0)):
                yield _Item(Entry(f"weight/{name}/{expert}", dtype, shape[1:]), name, expert)


def _balance(template: Any, weights: ModelWeights, extra: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return biases, loads of 0 and the other buffers of the state dict, by key."""
    found, names = {}, {id(module): name for name, module in template.named_modules()}
    for block in moe_blocks(template):
        name = f"{names[id(block.holder)]}.{block.bias_name}"
        bias = torch.zeros(num_choices(block.gate, getattr(block.holder, block.bias_name, None)))
        if name in weights.names and not block.added:
            weights.fill(bias.view(shapes_of(template)[name]), name)
        found[f"bias/{name}"] = extra.get(name, bias)
        found[f"load/{name}"] = torch.zeros(bias.shape, dtype=torch.int64)
    parameters = {name for name, _ in template.named_parameters()}
    for name, shape in shapes_of(template).items():
        if name not in parameters and not is_bias(name):
            found[f"buffer/{name}"] = torch.empty(shape, dtype=weights.dtype(name))
            weights.fill(found[f"buffer/{name}"], name)
    return found
