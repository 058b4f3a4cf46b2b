"""Check that a save is complete and undamaged, and describe it. Needs neither torch nor other ranks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from alfb_dist.checkpoint import manifest as manifests
from alfb_dist.checkpoint.folder_names import step_of
from alfb_dist.checkpoint.manifest import Manifest
from alfb_dist.checkpoint.safetensors_file import first_keys, scan


def size_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Return why the save is incomplete, by the manifest and the sizes of files; reads no other file."""
    problems = []
    if step_of(folder) != manifest["step"]:
        problems.append(f"{folder} holds step {manifest['step']}: it was renamed or copied from another save")
    for name, record in manifest["files"].items():
        path = folder / name
        if Path(name).name != name:
            problems.append(f"{folder / manifests.NAME} names a file outside the directory: {name}")
        elif not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != record["bytes"]:
            problems.append(f"{path} has {path.stat().st_size:,} bytes, but the manifest says {record['bytes']:,}")
    experts = {layer: len(found) for layer, found in manifest["experts"].items()}
    expected = manifests.fingerprints(manifest["tensors"], experts)
    for layer, found in manifest["experts"].items():
        wrong = [i for i, (a, b) in enumerate(zip(found, expected[layer])) if a != b]
        if wrong:
            problems.append(f"{folder}: the weights of {layer} do not match the fingerprints of experts {wrong}")
    return problems


def content_problems(folder: Path, names: Iterable[str], manifest: Manifest) -> list[str]:
    """Return why files of the save are damaged or not those saved; reads each file once."""
    expected: dict[str, dict[str, Any]] = {}
    for key, found in manifest["tensors"].items():
        expected.setdefault(found["file"], {})[key] = {k: found[k] for k in ("dtype", "shape", "xxh3_128")}
    return [
        problem
        for name in names
        for problem in _file_problems(folder / name, manifest["files"][name]["xxh3_128"], expected.get(name, {}))
    ]


def _file_problems(path: Path, saved_digest: str, expected: dict[str, Any]) -> list[str]:
    tensors = {}
    try:
        if path.suffix == ".safetensors":
            found = scan(path)
            digest, tensors = found.xxh3_128, found.tensors
        else:
            digest = xxhash.xxh3_128_hexdigest(path.read_bytes())
    except Exception as e:
        # A damaged header can raise any error.
        return [f"{path} is damaged or unreadable: {e}"]
    if digest != saved_digest:
        return [f"{path} is damaged: its xxh3-128 is {digest}, but the manifest says {saved_digest}"]
    if tensors != expected:
        wrong = sorted(key for key in {*tensors, *expected} if tensors.get(key) != expected.get(key))
        return [f"{path} does not match the manifest in {first_keys(wrong)}"]
    return []


def verify(folder: Path) -> list[str]:
    """Return the problems of a save, each naming its file; empty if it is good. Reads every byte once."""
    try:
        manifest = manifests.read(folder)
    except ValueError as e:
        return [str(e)]
    return size_problems(folder, manifest) or content_problems(folder, manifest["files"], manifest)


def describe(folder: Path) -> dict[str, Any]:
    """Return step, topology, versions and sizes of a save. Raises ValueError if its manifest cannot be read."""
    manifest = manifests.read(folder)
    tensors = manifest["tensors"]
    kinds = [key.partition("/")[0] for key in tensors]
    return {
        "step": manifest["step"],
        **manifest["topology"],
        "config_hash": manifest["config_hash"],
        "versions": manifest["versions"],
        "num_files": len(manifest["files"]),
        "bytes": sum(record["bytes"] for record in manifest["files"].values()),
        "num_tensors": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "num_experts": {layer: len(found) for layer, found in manifest["experts"].items()},
    }
