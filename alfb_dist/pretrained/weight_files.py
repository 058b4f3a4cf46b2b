"""The weight files of a transformers directory: one safetensors file, or several with an index."""

from __future__ import annotations

import json
from pathlib import Path

from alfb_dist.checkpoint.safetensors_file import first_keys
from alfb_dist.checkpoint.safetensors_reader import SafetensorsReader

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def open_folder(folder: Path) -> SafetensorsReader:
    """Return the tensors of a transformers directory. Raises ValueError if files are missing or pickled."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory: give a local one, nothing is fetched")
    if not (folder / INDEX).is_file():
        if (folder / WEIGHTS).is_file():
            return SafetensorsReader([folder / WEIGHTS])
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickled:
            raise ValueError(
                f"{folder} has pickled weights only ({pickled[0]}), which can run code and are not read: "
                "convert them to safetensors"
            )
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    places = _weight_map(folder / INDEX)
    missing = sorted(name for name in set(places.values()) if not (folder / name).is_file())
    if missing:
        raise ValueError(f"{folder} lacks {first_keys(missing)}, named in {INDEX}")
    reader = SafetensorsReader(folder / name for name in sorted(set(places.values())))
    wrong = sorted(n for n, file in places.items() if n not in reader.tensors or reader.tensors[n].path.name != file)
    if wrong:
        raise ValueError(f"{folder}: {wrong[0]} is not in {places[wrong[0]]}, where {INDEX} places it")
    return reader


def _weight_map(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_text())["weight_map"]
        outside = [name for name in places.values() if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged: {type(e).__name__}: {e}") from e
    if outside:
        raise ValueError(f"{path} names a file outside the directory: {outside[0]}")
    return dict(places)
