"""Read a model such that each rank reads and holds its own experts only."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alfb_dist.distributed.agreement import on_every_rank
from alfb_dist.distributed.collectives import Group, group_rank, world_group
from alfb_dist.moe.families.blocks import moe_blocks
from alfb_dist.moe.parallelize import check_parallelizable, shard_model
from alfb_dist.moe.sharded_experts import sharded_experts
from alfb_dist.moe.sharding import Sharding
from alfb_dist.pretrained.folder import (
    SIDECAR,
    choose_dtype,
    meta_model,
    read_config,
    read_generation_config,
    read_sidecar,
)
from alfb_dist.pretrained.names import float32_names, is_bias
from alfb_dist.pretrained.weight_files import open_folder
from alfb_dist.pretrained.weights import FolderWeights, ModelWeights


def from_pretrained(
    path: str | Path,
    *,
    ep_degree: int,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    **options: Any,
) -> Any:
    """Return the transformers model of a directory, parallelised, on CPU, in evaluation mode; collective.

    A rank reads its own experts and the dense weights, and needs memory for these and one more tensor at most.
    `initialize` puts the model in training mode; another loop must call model.train(), or loads are not counted.
    path: a local directory with config.json and safetensors files, experts fused or one by one; weights in block-wise
        fp8 or mxfp4 are dequantised. Nothing is fetched, no code in it is run, pickled weights are refused.
    dtype: of the weights; by default that of the configuration, or else of the files. Selection biases are float32.
    attn_implementation: as in transformers. options: more arguments of `parallelize`.
    Warns if biases in the directory were rounded to 16 bits. Raises ValueError on every rank as `parallelize` does, and
    before a tensor is read if some are missing, unknown or mis-shaped.
    """
    return load_model(path, Sharding(ep_degree=ep_degree, **options), dtype, attn_implementation)


def load_model(
    path: str | Path, sharding: Sharding, dtype: torch.dtype | str | None = None, attn_implementation: str | None = None
) -> Any:
    """Return the model of a directory with this rank's share of its experts; collective. See `from_pretrained`."""
    folder, group = Path(path), world_group()
    model, weights, dtype = on_every_rank(lambda: open_model(folder, dtype, attn_implementation), group, ValueError)
    _read_share(model, weights, dtype, sharding, group)
    on_every_rank(lambda: load_biases(model, extra_biases(folder, weights), folder / SIDECAR), group, ValueError)
    _warn_of_rounding(model, weights, group)
    read_generation_config(model, folder)
    return model.eval()


def _read_share(model: Any, weights: ModelWeights, dtype: torch.dtype, sharding: Sharding, group: Group) -> None:
    """Parallelise a model on the meta device and read this rank's share of the weights into it; collective."""
    on_every_rank(lambda: check_parallelizable(model, sharding.ep_degree), group, ValueError)
    on_every_rank(lambda: read_dense(model, weights, dtype), group, ValueError)
    shard_model(model, sharding)
    on_every_rank(lambda: read_experts(model, weights), group, ValueError)


class _NoWeights:
    """No stored weights: experts become 0, all else is as transformers initialises it."""

    names: Collection[str] = ()

    def dtype(self, name: str) -> torch.dtype:
        """Raise KeyError: no tensor is stored."""
        raise KeyError(name)

    def fill(self, destination: Tensor, name: str, first: int = 0) -> None:
        """Set the destination to 0."""
        destination.zero_()


def make_room(model: Any, dtype: torch.dtype, sharding: Sharding) -> None:
    """Parallelise a model on the meta device and allocate this rank's share of its weights; collective.

    Experts are 0 until a run's checkpoint is loaded. Raises ValueError as `parallelize` does.
    """
    _read_share(model, _NoWeights(), dtype, sharding, world_group())


def open_model(
    folder: Path, dtype: Any = None, attn_implementation: str | None = None
) -> tuple[Any, FolderWeights, torch.dtype]:
    """Return the model on the meta device, its stored weights and its type. Headers are checked, no tensor is read.

    Raises ValueError if the directory is not a complete model.
    """
    reader = open_folder(folder)
    config, block = read_config(folder)
    dtype = choose_dtype(dtype, config, reader)
    model = meta_model(config, dtype, attn_implementation)
    weights = FolderWeights(reader, model, block, part=type(model.config) is not type(config))
    if unequal := weights.unequal_tied(model.all_tied_weights_keys):
        raise ValueError(
            f"{unequal[0]} is tied by the configuration, but has other values in {folder}: "
            "set tie_word_embeddings to false in its config.json"
        )
    return model, weights, dtype


def extra_biases(folder: Path, weights: FolderWeights) -> dict[str, Tensor]:
    """Return the selection biases in a directory that the family's own model does not have, by name.

    They are in a sidecar, or among the tensors, where transformers saves those of a balanced model.
    """
    return {**weights.added_biases(), **read_sidecar(folder)}


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the model's parameter or buffer of this name; a parameter keeps its attributes."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = module._parameters.get(leaf)
    if old is None:
        module._buffers[leaf] = tensor
        return
    new = nn.Parameter(tensor, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    module._parameters[leaf] = new


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def read_dense(model: Any, weights: ModelWeights, dtype: torch.dtype) -> None:
    """Read or initialise all of a model on the meta device except its experts."""
    experts = tuple(f"{block.name}.experts." for block in moe_blocks(model))
    float32 = float32_names(model, dtype)
    read = []
    for name, meta in list(_tensors(model)):
        if name in weights.names:
            meta._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers would initialise it
        if name.startswith(experts):
            continue
        kept = torch.float32 if meta.is_floating_point() and name in float32 else meta.dtype
        _set_tensor(model, name, torch.empty(meta.shape, dtype=kept))
        placed = model.get_parameter_or_buffer(name)
        placed._is_hf_initialized = name in weights.names
        if name in weights.names:
            read.append((name, placed))
    model.initialize_weights()  # of tensors that no file has: computed buffers
    model.tie_weights()
    for name, placed in read:
        weights.fill(placed.detach(), name)


@torch.no_grad()
def read_experts(model: Any, weights: ModelWeights) -> None:
    """Read the tensors that are still on the meta device: this rank's part of sharded experts, all of others."""
    first = {}
    for name, module in sharded_experts(model):
        for parameter, _ in module.named_parameters():
            first[f"{name}.{parameter}"] = module.ep_rank * module.num_local_experts
    for name, meta in list(_tensors(model)):
        if meta.is_meta:
            local = torch.empty(meta.shape, dtype=meta.dtype)
            weights.fill(local, name, first.get(name, 0))
            _set_tensor(model, name, local)


@torch.no_grad()
def load_biases(model: nn.Module, values: dict[str, Tensor], path: Path) -> None:
    """Set the model's selection biases to the values read from a file. Raises ValueError if they do not fit."""
    biases = {name: x for name, x in model.state_dict(keep_vars=True).items() if is_bias(name)}
    if unknown := sorted(values.keys() - biases.keys()):
        raise ValueError(f"{path} has {unknown[0]}, which is not a selection bias of {type(model).__name__}")
    for name, bias in values.items():
        if bias.shape != biases[name].shape:
            raise ValueError(f"{name} is {tuple(bias.shape)} in {path} and {tuple(biases[name].shape)} in the model")
        biases[name].data.copy_(bias)


def is_rounded(bias: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a bias, stored in this type, was rounded to 16 bits at some time, by its values."""
    values = bias.detach().float().flatten()
    if not bool(values.any()):
        return False
    if dtype in (torch.bfloat16, torch.float16):
        return True
    return len(values.unique()) > 2 and torch.equal(values, values.bfloat16().float())


def _warn_of_rounding(model: Any, weights: ModelWeights, group: Group) -> None:
    names = [n for n in weights.names if is_bias(n)]
    found = [n for n in names if is_rounded(model.get_parameter_or_buffer(n), weights.dtype(n))]
    if found and group_rank(group) == 0:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        warnings.warn(
            f"selection biases were rounded to 16 bits before they were saved ({found[0]}{more}): biases that differed "
            "may be equal now, and loads will differ from the original model's until the biases have moved",
            stacklevel=4,
        )
