"""The manifest of a save: its contents, and the hashes by which every byte is checked.

It is JSON. Its first key is the xxh3-128 of the whole file, computed with zeros in the place of that hash.
Keys: format, version, step, topology (world_size, ep_degree, zero_stage), config_hash, versions,
    files    {name: {bytes, xxh3_128}}
    tensors  {key: {file, dtype, shape, xxh3_128}}, keys as in `tensors.py`
    experts  {experts module: [fingerprint of each global expert]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

NAME = "manifest.json"
FORMAT, VERSION = "alfb_dist checkpoint", 1

_START = b'{\n"checksum": "'
_BLANK = b"0" * 32

Manifest = dict[str, Any]


def make(
    *,
    step: int,
    topology: Mapping[str, int],
    config_hash: str | None,
    versions: Mapping[str, str],
    files: Mapping[str, Any],
    tensors: Mapping[str, Any],
    num_experts: Mapping[str, int],
) -> Manifest:
    """Return the body of a manifest. files, tensors: entries by name. num_experts: number by experts module."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "topology": dict(topology),
        "config_hash": config_hash,
        "versions": dict(versions),
        "files": dict(files),
        "tensors": dict(tensors),
        "experts": fingerprints(tensors, num_experts),
    }


def to_json(value: Any) -> str:
    """Return the value as compact JSON."""
    return json.dumps(value, separators=(",", ":"))


def encode(body: Mapping[str, Any]) -> bytes:
    """Return the manifest file of this body, one key a line, checksum first."""
    lines = [f"{json.dumps(key)}: {to_json(value)}" for key, value in body.items()]
    blank = _START + _BLANK + b'",\n' + ",\n".join(lines).encode() + b"\n}\n"
    return blank.replace(_BLANK, xxhash.xxh3_128_hexdigest(blank).encode(), 1)


def decode(data: bytes) -> Manifest:
    """Return the body of a manifest file. Raises ValueError if it is damaged or of another format or version."""
    place = slice(len(_START), len(_START) + len(_BLANK))
    if not data.startswith(_START) or len(data) < place.stop:
        raise ValueError("is damaged or not a manifest of alfb_dist")
    blank = data[: place.start] + _BLANK + data[place.stop :]
    if xxhash.xxh3_128_hexdigest(blank).encode() != data[place]:
        raise ValueError("is damaged: its checksum does not match")
    body: Manifest = json.loads(data)
    del body["checksum"]
    if body.get("format") != FORMAT or body.get("version") != VERSION:
        raise ValueError(f"is {body.get('format')} {body.get('version')}; this program reads {FORMAT} {VERSION}")
    return body


def read(folder: Path) -> Manifest:
    """Return the manifest of a save. Raises ValueError if it is missing, damaged or of another format or version."""
    path = folder / NAME
    try:
        return decode(path.read_bytes())
    except OSError as e:
        raise ValueError(f"{path} cannot be read, so the save is not finished: {e.strerror or e}") from e
    except ValueError as e:
        raise ValueError(f"{path} {e}") from e


def fingerprints(tensors: Mapping[str, Mapping[str, Any]], num_experts: Mapping[str, int]) -> dict[str, list[str]]:
    """Return, by experts module, the fingerprint of each global expert's weights.

    A fingerprint is the xxh3-128 of the hashes of the expert's weights in the order of their names, so it does not
    depend on the run's parallel layout. num_experts: number by experts module.
    """
    weights: dict[tuple[str, int], list[str]] = {}
    for key in sorted(tensors):
        kind, _, name = key.partition("/")
        parameter, _, expert = name.rpartition("/")
        if kind == "weight" and parameter:
            layer = parameter.rpartition(".")[0]
            weights.setdefault((layer, int(expert)), []).append(tensors[key]["xxh3_128"])
    return {
        layer: [xxhash.xxh3_128_hexdigest("".join(weights.get((layer, e), [])).encode()) for e in range(experts)]
        for layer, experts in num_experts.items()
    }
