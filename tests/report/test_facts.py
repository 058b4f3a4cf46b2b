"""The facts of a run: found under every name that the families of transformers have for them."""

from __future__ import annotations

from support.tiny_families import FAMILIES

from alfb_dist.config.keys import family_keys
from alfb_dist.report.facts import model_facts

SIZES = {"layers", "hidden size", "routed experts", "experts per token"}


def test_facts_are_found_at_any_depth() -> None:
    config = {"config": {"model": {"config": {"n_routed_experts": 64}}}, "num_parameters": 1_500_000_000}
    assert model_facts(config) == [("parameters", "1.50B"), ("routed experts", "64")]


def test_sizes_are_found_under_the_names_of_every_family() -> None:
    missing = {}
    for family in FAMILIES:
        keys = family_keys(family)
        assert keys is not None
        for names in (keys.kinds, map(keys.canonical, keys.kinds)):  # those that it declares, those that it stores
            facts = dict(model_facts({"model": {"config": dict.fromkeys(names, 2)}}))
            if absent := SIZES - facts.keys():
                missing[family] = absent
    assert missing == {}


def test_number_of_shared_experts_is_found_wherever_a_family_has_one() -> None:
    found, expected = {}, {}
    for family in FAMILIES:
        keys = family_keys(family)
        assert keys is not None
        counts = [name for name in map(keys.canonical, keys.kinds) if name.endswith("shared_experts")]
        found[family] = model_facts({"model": {"config": dict.fromkeys(counts, 3)}})
        expected[family] = [("shared experts", "3")] if counts else []
    assert found == expected
    assert len([facts for facts in expected.values() if facts]) > 20


def test_layers_given_one_by_one_are_counted() -> None:
    config = {"model": {"config": {"layers_block_type": ["mamba", "moe", "full_attention"]}}}
    assert model_facts(config) == [("layers", "3")]
