"""Reading a model so that each rank reads, and ever holds, its own experts only."""

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
    """The transformers model of a folder, parallelised, on CPU, in evaluation mode; collective.

    A rank reads its own experts and what all ranks hold, and never has more memory than for that and one more tensor.
    Before training, `initialize` puts the model in training mode; another loop calls model.train(), or nothing counts.
    path: a local folder with config.json and safetensors files, experts fused or under their own names; weights in
        block-wise fp8 or mxfp4 are dequantised. Nothing is fetched, no code of the folder is run, pickled weights are
        refused.
    dtype: of the weights; the configuration's, or else the files', unless given. Selection biases are float32 anyway.
    attn_implementation: as in transformers. options: more for `parallelize`.
    Warns if biases were rounded to 16 bits in the folder. Raises ValueError on every rank alike: before a tensor is
    read, naming those that are missing, unknown or mis-shaped; and where `parallelize` does.
    """
    return load_model(path, Sharding(ep_degree=ep_degree, **options), dtype, attn_implementation)


def load_model(
    path: str | Path, sharding: Sharding, dtype: torch.dtype | str | None = None, attn_implementation: str | None = None
) -> Any:
    """Return the model of a directory with this rank's share of its experts; collective. See `from_pretrained`."""
    folder, group = Path(path), world_group()
    model, weights, dtype = on_every_rank(lambda: open_model(folder, dtype, attn_implementation), group, ValueError)
    _read_share(model, weights, dtype, sharding, group)
    on_every_rank(lambda: put_biases(model, homeless_biases(folder, weights), folder / SIDECAR), group, ValueError)
    _warn_of_rounding(model, weights, group)
    read_generation_config(model, folder)
    return model.eval()


def _read_share(model: Any, weights: ModelWeights, dtype: torch.dtype, sharding: Sharding, group: Group) -> None:
    """The model, made without memory, is parallelised and has this rank's share of the weights; collective."""
    on_every_rank(lambda: check_parallelizable(model, sharding.ep_degree), group, ValueError)
    on_every_rank(lambda: read_common(model, weights, dtype), group, ValueError)
    shard_model(model, sharding)
    on_every_rank(lambda: read_experts(model, weights), group, ValueError)


class _NoWeights:
    """Nothing to read: experts are 0, all else is as transformers initialises it."""

    names: Collection[str] = ()

    def dtype(self, name: str) -> torch.dtype:
        """Of no tensor."""
        raise KeyError(name)

    def fill(self, destination: Tensor, name: str, first: int = 0) -> None:
        """The destination is 0."""
        destination.zero_()


def make_room(model: Any, dtype: torch.dtype, sharding: Sharding) -> None:
    """The model, made without memory, is parallelised and has room for this rank's share of its weights; collective.

    They are to be read into it from a run's checkpoint: experts are 0 until then. Errors: see `parallelize`.
    """
    _read_share(model, _NoWeights(), dtype, sharding, world_group())


def open_model(
    folder: Path, dtype: Any = None, attn_implementation: str | None = None
) -> tuple[Any, FolderWeights, torch.dtype]:
    """The model without memory and what it will be filled from; everything is checked that headers can tell.

    ValueError for whatever is wrong with the folder.
    """
    reader = open_folder(folder)
    config, block = read_config(folder)
    dtype = choose_dtype(dtype, config, reader)
    model = meta_model(config, dtype, attn_implementation)
    weights = FolderWeights(reader, model, block, part=type(model.config) is not type(config))
    if unequal := weights.unequal_tied(model.all_tied_weights_keys):
        raise ValueError(
            f"{unequal[0]} is tied by the configuration, but has values of its own in {folder}: "
            "set tie_word_embeddings to false in its config.json"
        )
    return model, weights, dtype


def homeless_biases(folder: Path, weights: FolderWeights) -> dict[str, Tensor]:
    """The biases of a folder for which the family has no place, by name.

    They are in a sidecar, or among the tensors, as transformers itself saves a model that was balanced.
    """
    return {**weights.added_biases(), **read_sidecar(folder)}


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """The model has this tensor as its parameter or buffer; a parameter keeps its marks."""
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
def read_common(model: Any, weights: ModelWeights, dtype: torch.dtype) -> None:
    """All of the model but its experts is in memory, as the folder has it or transformers initialises it."""
    experts = tuple(f"{block.name}.experts." for block in moe_blocks(model))
    float32 = float32_names(model, dtype)
    read = []
    for name, meta in list(_tensors(model)):
        if name in weights.names:
            meta._is_hf_initialized = True  # type: ignore[attr-defined]  # so transformers leaves it alone
        if name.startswith(experts):
            continue
        kept = torch.float32 if meta.is_floating_point() and name in float32 else meta.dtype
        _put(model, name, torch.empty(meta.shape, dtype=kept))
        placed = model.get_parameter_or_buffer(name)
        placed._is_hf_initialized = name in weights.names
        if name in weights.names:
            read.append((name, placed))
    model.initialize_weights()  # of what no file has: buffers that are computed
    model.tie_weights()
    for name, placed in read:
        weights.fill(placed.detach(), name)


@torch.no_grad()
def read_experts(model: Any, weights: ModelWeights) -> None:
    """What was still without memory has it: this rank's part of experts that are sharded, the whole of others."""
    first = {}
    for name, module in sharded_experts(model):
        for parameter, _ in module.named_parameters():
            first[f"{name}.{parameter}"] = module.ep_rank * module.num_local_experts
    for name, meta in list(_tensors(model)):
        if meta.is_meta:
            local = torch.empty(meta.shape, dtype=meta.dtype)
            weights.fill(local, name, first.get(name, 0))
            _put(model, name, local)


@torch.no_grad()
def put_biases(model: nn.Module, given: dict[str, Tensor], where: Path) -> None:
    """The model's biases of these names have these values. ValueError, naming the file, if they are not the model's."""
    biases = {name: x for name, x in model.state_dict(keep_vars=True).items() if is_bias(name)}
    if unknown := sorted(given.keys() - biases.keys()):
        raise ValueError(f"{where} has {unknown[0]}, which is no selection bias of {type(model).__name__}")
    for name, bias in given.items():
        if bias.shape != biases[name].shape:
            raise ValueError(f"{name} is {tuple(bias.shape)} in {where} and {tuple(biases[name].shape)} in the model")
        biases[name].data.copy_(bias)


def rounded(bias: Tensor, dtype: torch.dtype) -> bool:
    """Whether a bias, stored in this type, shows that it was rounded to 16 bits at some time."""
    values = bias.detach().float().flatten()
    if not bool(values.any()):
        return False
    if dtype in (torch.bfloat16, torch.float16):
        return True
    return len(values.unique()) > 2 and torch.equal(values, values.bfloat16().float())


def _warn_of_rounding(model: Any, weights: ModelWeights, group: Group) -> None:
    names = [n for n in weights.names if is_bias(n)]
    found = [n for n in names if rounded(model.get_parameter_or_buffer(n), weights.dtype(n))]
    if found and group_rank(group) == 0:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        warnings.warn(
            f"selection biases were rounded to 16 bits before they were saved ({found[0]}{more}): experts whose biases "
            "differed are equal now, and loads will differ from the original model's until the biases have moved",
            stacklevel=4,
        )
