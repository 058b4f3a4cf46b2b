"""The small files of a transformers directory: the configuration, and all else except the weights."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alfb_dist.checkpoint.safetensors_file import write_tensors
from alfb_dist.checkpoint.safetensors_reader import SafetensorsReader
from alfb_dist.pretrained.fp8 import FLOAT8, block_size

CONFIG, GENERATION = "config.json", "generation_config.json"
SIDECAR = "alfb_bias.safetensors"
"""Selection biases, float32 by the model's names, of a family whose own model does not have them."""

_COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tiktoken.model",
    "tokenization_*.py",
    "tokenizer.*",
    "tokenizer_config.json",
    "vocab.*",
    "LICENSE*",
)


def read_values(folder: Path) -> dict[str, Any]:
    """Return the content of config.json. Raises ValueError if it is missing or not a JSON object."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: give a local directory, nothing is fetched")
    values = json.loads((folder / CONFIG).read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{folder / CONFIG} must hold a JSON object")
    return values


def foreign_type(values: dict[str, Any]) -> str | None:
    """Return transformers' model type for a model_type that it does not know (kimi_k2) but whose class it has, or None.

    Such a directory comes with code of its own, which is not run; its `architectures` name the class.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if values.get("model_type") in CONFIG_MAPPING:
        return None
    classes = values.get("architectures") or [None]
    return next((name for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if kind == classes[0]), None)


def read_config(folder: Path) -> tuple[Any, tuple[int, int]]:
    """Return the configuration of a directory without its quantisation, and the block size of that.

    No code in the directory is run. Raises ValueError if transformers does not know the model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = read_values(folder)
    if (model_type := foreign_type(values)) is not None:
        config: Any = CONFIG_MAPPING[model_type].from_dict({**values, "model_type": model_type})
        config._name_or_path = str(folder)
    elif values.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder}: transformers knows neither the model_type {values.get('model_type')!r} nor the architectures "
            f"{values.get('architectures')}; the directory's own code is not run"
        )
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    block = block_size(getattr(config, "quantization_config", None))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config, block


def choose_dtype(dtype: torch.dtype | str | None, config: Any, reader: SafetensorsReader) -> torch.dtype:
    """Return the type asked for, or that of the configuration, or that of the files' first float tensor."""
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(f"dtype ({dtype!r}) must be a float type of torch, such as 'bfloat16'")
        return found
    if isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    floats = (s.dtype for s in reader.tensors.values() if s.dtype.is_floating_point)
    first = next(floats, torch.float32)
    return torch.bfloat16 if first == FLOAT8 else first


def meta_model(config: Any, dtype: torch.dtype | None = None, attn_implementation: str | None = None) -> Any:
    """Return a causal language model of this configuration on the meta device."""
    from transformers import AutoModelForCausalLM

    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **options)


def read_generation_config(model: Any, folder: Path) -> None:
    """Set the model's generation settings to those of the directory, if it has any."""
    from transformers import GenerationConfig

    if (folder / GENERATION).is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def write_small_files(folder: Path, model: Any, dtype: torch.dtype, origin: Path | None) -> None:
    """Write the model's configuration and generation settings, and copy the tokenizer's files of its origin."""
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], dtype
    for name in ("quantization_config", "auto_map"):  # the weights are floats, and the class is transformers' own
        if hasattr(config, name):
            delattr(config, name)
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if origin is not None and origin.is_dir():
        for pattern in _COPIED:
            for path in sorted(origin.glob(pattern)):
                if path.is_file() and not (folder / path.name).exists():
                    shutil.copyfile(path, folder / path.name)
        if (origin / "additional_chat_templates").is_dir():
            shutil.copytree(origin / "additional_chat_templates", folder / "additional_chat_templates")


def write_sidecar(folder: Path, biases: dict[str, Tensor]) -> None:
    """Write these biases, float32, to a file of their own."""
    write_tensors(folder / SIDECAR, biases)


def read_sidecar(folder: Path) -> dict[str, Tensor]:
    """Return the biases of the sidecar file by name; empty if there is none."""
    if not (folder / SIDECAR).is_file():
        return {}
    reader = SafetensorsReader([folder / SIDECAR])
    return {name: reader.read(name) for name in reader.tensors}
