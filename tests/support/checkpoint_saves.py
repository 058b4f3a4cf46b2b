"""Saves made without a run, and ways to damage one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash

from alfb_dist.checkpoint import files, folder, manifest
from alfb_dist.checkpoint.safetensors_file import write_tensors

LAYER = "model.layers.1.mlp.experts"


def fabricate(checkpoints: Path, step: int) -> Path:
    """Write a good save of two experts and little else, one file of each kind; return its directory."""
    path = folder.step_folder(checkpoints, step)
    tmp = folder.start(path)
    torch.manual_seed(step)
    parameters = (f"{LAYER}.down_proj", f"{LAYER}.gate_up_proj")
    experts = {f"weight/{name}/{e}": torch.randn(3, 4) for e in (0, 1) for name in parameters}
    dense = {"weight/model.norm.weight": torch.randn(5), "exp_avg/model.norm.weight": torch.randn(5)}
    listed: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    biases = {"bias/model.layers.1.mlp.gate.bias": torch.randn(2)}
    for name, held in (("tensors-00000-000.safetensors", experts | dense), ("balance.safetensors", biases)):
        listed[name], written = write_tensors(tmp / name, held)
        tensors |= written
    small = {"state.json": {"state": {"seed": step}}, "rng-00000.json": {"python": [3, [1, 2, 3], None]}}
    for name, value in small.items():
        listed[name] = files.write_file(tmp / name, manifest.to_json(value).encode())
    body = {
        "format": manifest.FORMAT,
        "version": manifest.VERSION,
        "step": step,
        "topology": {"world_size": 1, "ep_degree": 1, "zero_stage": 1},
        "config_hash": "0123",
        "versions": {"alfb_dist": "0.1.0"},
        "files": listed,
        "tensors": tensors,
        "experts": manifest.fingerprints(tensors, {LAYER: 2}),
    }
    files.write_file(tmp / manifest.NAME, manifest.encode(body))
    folder.publish(path)
    return path


def flip(path: Path, bit: int) -> None:
    """Flip one bit of the file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def flip_some_bit(path: Path, seed: int) -> None:
    """Flip one bit of the file, chosen by the seed."""
    flip(path, random.Random(seed).randrange(8 * path.stat().st_size))


def truncate(path: Path, seed: int) -> None:
    """Truncate the file at a byte chosen by the seed."""
    size = path.stat().st_size
    with open(path, "rb+") as file:
        file.truncate(random.Random(seed).randrange(size))


def swap(first: Path, second: Path) -> None:
    """Exchange the content of two files."""
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def edit_manifest(save: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and its checksum."""
    body = manifest.read(save)
    change(body)
    (save / manifest.NAME).write_bytes(manifest.encode(body))


def accept(save: Path, name: str) -> None:
    """Set the size and hash of a file in the manifest to the present ones."""
    data = (save / name).read_bytes()
    record = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    edit_manifest(save, lambda body: body["files"].update({name: record}))


def swap_tensors(save: Path, first: str, second: str) -> None:
    """Exchange the content of two tensors of a file, in the manifest too, so that only fingerprints differ."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    tensors = manifest.read(save)["tensors"]
    path = save / tensors[first]["file"]
    with safe_open(path, "pt") as file:
        keys = list(file.offset_keys())
    held = load_file(path)
    held[first], held[second] = held[second].clone(), held[first].clone()
    path.unlink()
    _, written = write_tensors(path, {key: held[key] for key in keys})
    edit_manifest(save, lambda body: body["tensors"].update(written))
    accept(save, path.name)
