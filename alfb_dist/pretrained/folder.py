"""The small files of a transformers folder: what model it is, and what belongs to a model beside its weights."""

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
"""Selection biases, float32 by the model's names, of a family whose own files have no place for them."""

_CARRIED = (
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
    """What config.json says. ValueError if there is none, or it holds no object."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}; models are read from local folders, nothing is fetched")
    values = json.loads((folder / CONFIG).read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{folder / CONFIG} holds no JSON object")
    return values


def foreign_type(values: dict[str, Any]) -> str | None:
    """transformers' name for a model whose model_type it does not know (kimi_k2), but whose class it has.

    Such a folder brings code of its own, which is not run; its `architectures` say what the model is.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if values.get("model_type") in CONFIG_MAPPING:
        return None
    classes = values.get("architectures") or [None]
    return next((name for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if kind == classes[0]), None)


def read_config(folder: Path) -> tuple[Any, tuple[int, int]]:
    """A folder's configuration, without its quantisation, and the block size of that. ValueError if there is none.

    Code that the folder may bring along is not run.
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
            f"{values.get('architectures')}; code that a folder brings along is not run"
        )
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    block = block_size(getattr(config, "quantization_config", None))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config, block


def choose_dtype(dtype: torch.dtype | str | None, config: Any, reader: SafetensorsReader) -> torch.dtype:
    """The type asked for, or that of the configuration, or that of the files' first float tensor."""
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
    """A causal language model of this configuration with shapes but without memory."""
    from transformers import AutoModelForCausalLM

    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **options)


def read_generation_config(model: Any, folder: Path) -> None:
    """The model generates as its folder says, if it does."""
    from transformers import GenerationConfig

    if (folder / GENERATION).is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def write_small_files(folder: Path, model: Any, dtype: torch.dtype, origin: Path | None) -> None:
    """The folder has the model's configuration and generation settings, and of its origin the tokenizer's files."""
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], dtype
    for name in (
        "quantization_config",
        "auto_map",
    ):  # neither is true of what is written: the class is transformers' own
        if hasattr(config, name):
            delattr(config, name)
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if origin is not None and origin.is_dir():
        for pattern in _CARRIED:
            for path in sorted(origin.glob(pattern)):
                if path.is_file() and not (folder / path.name).exists():
                    shutil.copyfile(path, folder / path.name)
        if (origin / "additional_chat_templates").is_dir():
            shutil.copytree(origin / "additional_chat_templates", folder / "additional_chat_templates")


def write_sidecar(folder: Path, biases: dict[str, Tensor]) -> None:
    """The folder has these biases, float32, in a file of their own."""
    write_tensors(folder / SIDECAR, biases)


def read_sidecar(folder: Path) -> dict[str, Tensor]:
    """The biases that lie beside a model in its folder, by name; none if there is no such file."""
    if not (folder / SIDECAR).is_file():
        return {}
    reader = SafetensorsReader([folder / SIDECAR])
    return {name: reader.read(name) for name in reader.tensors}
