"""The keys that the configuration knows are those of the installed DeepSpeed and transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from alfb_dist.config.keys import (
    DEEPSPEED_KEYS,
    DERIVED_KEYS,
    EXPERT_NAMES,
    TOP_K_NAMES,
    ZERO_KEYS,
    family_keys,
    moe_families,
)

FAMILIES = """deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe glm4_moe glm4_moe_lite glm_moe_dsa hy_v3
    longcat_flash mimo_v2_flash minimax_m2 mixtral olmoe qwen3_moe solar_open"""


class Recorder(dict):  # type: ignore[type-arg]
    """A DeepSpeed dict that remembers the keys asked for, and the defaults of those that have one."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(**entries)
        self.asked: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        self.asked[key] = default
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def keys(self) -> Any:  # DeepSpeed asks `key in config.keys()` too
        return self

    def __copy__(self) -> Recorder:
        return self


@pytest.fixture(scope="module")
def asked() -> dict[str, Any]:
    recorder = Recorder(train_micro_batch_size_per_gpu=1)
    DeepSpeedConfig(recorder)
    return {key: default for key, default in recorder.asked.items() if key not in _REMOVED_TOP_LEVEL_CONFIG_KEYS}


def test_deepspeed_keys_are_those_that_deepspeed_asks_for(asked: dict[str, Any]) -> None:
    only_with_ranks = {"sequence_parallel_size"}
    assert set(asked) == (set(DEEPSPEED_KEYS) | set(DERIVED_KEYS)) - only_with_ranks


def test_deepspeed_kinds_are_those_of_its_defaults(asked: dict[str, Any]) -> None:
    kinds = {"bool": bool, "int": int, "float": float, "str": str, "table": dict}
    defaults = {key: asked[key] for key in DEEPSPEED_KEYS if asked.get(key) is not None}
    assert len(defaults) > 15
    for key, default in defaults.items():
        assert isinstance(default, kinds[DEEPSPEED_KEYS[key]]), key


def test_zero_keys_and_kinds_are_those_of_deepspeed() -> None:
    fields = DeepSpeedZeroConfig.model_fields
    assert set(ZERO_KEYS) == set(fields) | {field.alias for field in fields.values() if field.alias}
    for name, field in fields.items():
        annotation = str(field.annotation)
        kind = "bool" if "bool" in annotation else "int" if "int" in annotation or name == "stage" else "table"
        assert {ZERO_KEYS[key] for key in (name, field.alias) if key} == {kind}, name


@pytest.mark.parametrize("family", FAMILIES.split())
def test_family_keys_are_those_of_its_configuration_class(family: str) -> None:
    keys, declared = family_keys(family), CONFIG_MAPPING[family]
    assert keys is not None
    own = {field.name: field for field in dataclasses.fields(declared)}
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    assert set(own) - base <= set(keys.kinds)
    assert keys.synonyms == declared.attribute_map
    for key in set(keys.defaults) & set(own):
        assert own[key].default == keys.defaults[key], key
    assert not keys.names.isdisjoint(EXPERT_NAMES)
    assert not keys.names.isdisjoint(TOP_K_NAMES)
    assert family in moe_families()


def test_family_kinds_are_the_union_of_the_annotation() -> None:
    keys = family_keys("deepseek_v3")
    assert keys is not None
    assert keys.kinds["n_routed_experts"] == {"int"}
    assert keys.kinds["q_lora_rank"] == {"int", "None"}
    assert keys.kinds["attention_dropout"] == {"float", "int", "None"}
    assert keys.kinds["eos_token_id"] == {"int", "list", "None"}
    assert keys.kinds["rope_parameters"] is None  # holds a class: anything goes


@pytest.mark.parametrize("family", ["deepseek_v33", "", "..", "/", "../models/deepseek_v3", "a/b", "\0"])
def test_unknown_family_has_no_keys(family: str) -> None:
    assert family_keys(family) is None
