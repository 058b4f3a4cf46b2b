"""Transformers folders of tiny models: read, compared, and what reading them takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from alfb_dist.checkpoint.safetensors_reader import SafetensorsReader


def loaded(folder: Path, **options: Any) -> dict[str, Tensor]:
    """Return the state dict of the model that transformers reads from the folder."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    return dict(model.state_dict())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that two state dicts have the same names, types and values."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and torch.equal(found[name], x), name


def mixtral() -> MixtralForCausalLM:
    """Return a tiny model of a family whose gates have no bias."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


@contextmanager
def opened_readers() -> Iterator[list[SafetensorsReader]]:
    """Yield the readers of safetensors files that are made in the block."""
    opened: list[SafetensorsReader] = []
    init = SafetensorsReader.__init__

    def recorded(self: SafetensorsReader, paths: Any) -> None:
        opened.append(self)
        init(self, paths)

    SafetensorsReader.__init__ = recorded  # type: ignore[method-assign]
    try:
        yield opened
    finally:
        SafetensorsReader.__init__ = init  # type: ignore[method-assign]
