"""Check that a save fits the model, optimizer and scheduler; the parallel layout may differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alfb_dist.checkpoint import optimizer, tensors
from alfb_dist.checkpoint.manifest import Manifest
from alfb_dist.checkpoint.safetensors_file import first_keys
from alfb_dist.engine.balancer import Balancer


def saved_kinds(saved: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return, by parameter, the format's name of the type of each kind of tensor that was saved."""
    kinds: dict[str, dict[str, str]] = {}
    for key, found in saved.items():
        kind, _, name = key.partition("/")
        kinds.setdefault(name.partition("/")[0], {})[kind] = found["dtype"]
    return kinds


def _compare_experts(saved: Mapping[str, list[str]], here: Mapping[str, int]) -> None:
    for layer, experts in here.items():
        if layer in saved and len(saved[layer]) != experts:
            raise ValueError(f"{layer} has {experts} experts in the model and {len(saved[layer])} in the save")
    if missing := here.keys() ^ saved.keys():
        where = "in the model but not in the save" if missing & here.keys() else "in the save but not in the model"
        raise ValueError(f"MoE layers {where}: {first_keys(sorted(missing))}")


def _compare_tensors(engine: Any, balancer: Balancer, saved: Mapping[str, Mapping[str, Any]]) -> None:
    model, held = engine.module, optimizer.held(engine)
    kinds = saved_kinds(saved)
    expected = {t.key(optimizer.WEIGHT): t.shape for t in tensors.global_tensors(model)}
    for tensor in tensors.global_tensors(model):
        for kind in kinds.get(tensor.parameter, {}):
            expected[tensor.key(kind)] = tensor.shape
    extra = tensors.balance_tensors(model, balancer) | tensors.buffers(model, balancer)
    expected |= {key: tuple(tensor.shape) for key, tensor in extra.items()}
    if missing := expected.keys() - saved.keys():
        raise ValueError(f"the save has no {first_keys(sorted(missing))}: load a save of this model")
    if surplus := saved.keys() - expected.keys():
        names = first_keys(sorted(surplus))
        raise ValueError(f"the save has {names}, which the model does not have: load a save of this model")
    for key, shape in expected.items():
        if (found := tuple(saved[key]["shape"])) != shape:
            raise ValueError(f"{key} is {found} in the save and {shape} in the model: load a save of this model")
    frozen = [name for name, part in held.items() if part.group is None and len(kinds[name]) > 1]
    if frozen:
        raise ValueError(f"parameters that the saved run trained are frozen in the model: {first_keys(sorted(frozen))}")


def compare(engine: Any, balancer: Balancer, manifest: Manifest, saved: Mapping[str, Any]) -> None:
    """Raise ValueError, with both values, if a save does not fit the engine; no tensor is read.

    saved: the save's state.json. A save of a released model has weights alone, and no optimizer to compare.
    """
    _compare_experts(manifest["experts"], tensors.num_experts(engine.module))
    _compare_tensors(engine, balancer, manifest["tensors"])
    if saved["optimizer"] is None:
        return
    names = {id(p): name for name, p in engine.module.named_parameters()}
    here, there = type(optimizer.base_optimizer(engine)).__name__, saved["optimizer"]["name"]
    if here != there:
        raise ValueError(f"the optimizer is {here} here and {there} in the save: use the same")
    optimizer.match_hyperparameters(saved["optimizer"]["groups"], engine, names)
    scheduler = None if engine.lr_scheduler is None else type(engine.lr_scheduler).__name__
    before = saved["scheduler"] and saved["scheduler"]["name"]
    if scheduler != before:
        raise ValueError(f"the learning rate scheduler is {scheduler} here and {before} in the save: use the same")
