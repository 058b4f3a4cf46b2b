"""Settings that contradict each other are refused with both key paths, both values and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from alfb_dist.config import ConfigError, load_config
from alfb_dist.config.text import to_toml

DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"


def refusal(*overrides: str, path: Path = DEMO, world_size: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=world_size)
    return str(caught.value)


def write(directory: Path, text: str) -> Path:
    path = directory / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


RELATIONS = [
    (
        ["model.config.n_routed_experts=7"],
        "model.config.n_routed_experts (7) must be divisible by parallel.ep_degree (2): take 6 or 8",
    ),
    (
        ["train.global_batch=17"],
        "train.global_batch (17) must be divisible by train.micro_batch (8) x parallel.ep_degree (2) = 16: "
        "take 16 or 32",
    ),
    (
        ["model.config.num_experts_per_tok=17"],
        "model.config.num_experts_per_tok (17) must be at most model.config.n_routed_experts (16)",
    ),
    (
        ["model.config.n_group=3"],
        "model.config.n_routed_experts (16) must be divisible by model.config.n_group (3): take 15 or 18",
    ),
    (["model.config.topk_group=2"], "model.config.topk_group (2) must be at most model.config.n_group (1)"),
    (
        ["model.config.n_group=8", "model.config.topk_group=1"],
        "model.config.num_experts_per_tok (4) must be at most model.config.topk_group (1) x 2 experts per group = 2: "
        "select at least 2 groups",
    ),
    (
        ["model.config.n_group=16", "model.config.topk_group=8"],
        "model.config.n_routed_experts (16) must be at least twice model.config.n_group (16): a group's score is the "
        "sum of its top two; take at most 8 groups",
    ),
    (
        ["model.config.first_k_dense_replace=4"],
        "model.config.first_k_dense_replace (4) must be less than model.config.num_hidden_layers (4): without an MoE "
        "layer there is nothing to balance",
    ),
    (
        ["model.config.num_key_value_heads=3"],
        "model.config.num_attention_heads (4) must be divisible by model.config.num_key_value_heads (3): set "
        "num_key_value_heads to 4 or a divisor of it",
    ),
    (
        ["model.config.vocab_size=256"],
        'model.config.vocab_size (256) must be at least 257 for data.tokenizer ("bytes"): 256 bytes and the end of '
        "document",
    ),
    (
        ["data.sequence_length=513"],
        "data.sequence_length (513) must be at most model.config.max_position_embeddings (512)",
    ),
    (
        ["balance.zero_at_step=30", "balance.warmup_steps=30"],
        "balance.zero_at_step (30) must be greater than balance.warmup_steps (30)",
    ),
    (["optimizer.warmup_steps=201"], "optimizer.warmup_steps (201) must be at most train.steps (200)"),
    (
        ["model.config.num_local_experts=16"],
        "model.config.num_local_experts (16) and model.config.n_routed_experts (16) are the same setting: keep one",
    ),
    (
        ["model.config.routed_scaling_factor=1"],
        "model.config.routed_scaling_factor (1) must be a number: write 1.0",
    ),
    (["model.config.n_shared_experts=-1"], "model.config.n_shared_experts (-1) must be at least 0"),
    (["model.config.dtype=bfloat16"], 'model.config.dtype ("bfloat16") is set by model.dtype: remove it'),
    (
        ["model.family=deepseek_v33"],
        'model.family ("deepseek_v33") is not a model_type of the installed transformers; did you mean "deepseek_v3"?',
    ),
    (["model.family=../.."], 'model.family ("../..") is not a model_type of the installed transformers; for example'),
    (["model.family=gpt2"], 'model.family ("gpt2") has no routed experts; '),
    (
        ["model.config={}"],
        "model.config is missing: give it to start from random weights, or model.path for pretrained ones",
    ),
    (["model.path=somewhere"], 'model.path ("somewhere") and model.config (23 keys) are both given'),
]


@pytest.mark.parametrize(("overrides", "message"), RELATIONS, ids=[relation[0][0] for relation in RELATIONS])
def test_contradiction_is_refused_with_paths_and_values(overrides: list[str], message: str) -> None:
    assert any(line.startswith(message) for line in refusal(*overrides).splitlines()), refusal(*overrides)


def test_bounds_of_relations_are_accepted() -> None:
    overrides = (
        "model.config.n_group=8",
        "model.config.topk_group=2",
        "model.config.first_k_dense_replace=3",
        "model.config.vocab_size=257",
        "data.sequence_length=512",
        "balance.zero_at_step=31",
        "balance.warmup_steps=30",
        "optimizer.warmup_steps=200",
        "parallel.ep_degree=16",
        "train.global_batch=128",
    )
    assert load_config(DEMO, overrides, world_size=16).parallel.ep_degree == 16
    load_config(DEMO, ["model.config.num_experts_per_tok=16"])
    assert load_config(DEMO, ["model.config.vocab_size=1", "data.tokenizer=t.json"]).model.config["vocab_size"] == 1


def test_world_size_is_checked_where_it_is_known() -> None:
    assert load_config(DEMO, world_size=2) == load_config(DEMO)
    message = refusal("train.micro_batch=1", world_size=3)
    assert "the number of ranks (3) must be divisible by parallel.ep_degree (2): take 2 or 4" in message
    assert "train.global_batch (16) must be divisible by train.micro_batch (1) x the number of ranks (3) = 3" in message
    expected = (
        "train.global_batch (16) must be divisible by train.micro_batch (8) x the number of ranks (4) = 32: take 32"
    )
    assert refusal(world_size=4) == expected


def test_omitted_value_has_the_default_of_the_family(tmp_path: Path) -> None:
    tables = load_config(DEMO).model_dump()
    for key in ("n_group", "topk_group", "num_key_value_heads"):
        del tables["model"]["config"][key]
    message = refusal("model.config.n_routed_experts=12", path=write(tmp_path, to_toml(tables)))
    assert "model.config.n_routed_experts (12) must be divisible by model.config.n_group (8 by default)" in message
    assert "must be divisible by model.config.num_key_value_heads (128 by default)" in message


@pytest.mark.parametrize(
    ("family", "experts", "top_k"),
    [
        ("mixtral", "num_local_experts", "num_experts_per_tok"),
        ("qwen3_moe", "num_experts", "num_experts_per_tok"),
        ("glm4_moe", "n_routed_experts", "num_experts_per_tok"),
        ("ernie4_5_moe", "moe_num_experts", "moe_k"),
        ("ernie4_5_moe", "num_experts", "num_experts_per_tok"),
        ("longcat_flash", "n_routed_experts", "moe_topk"),
    ],
)
def test_number_of_experts_has_the_name_of_its_family(tmp_path: Path, family: str, experts: str, top_k: str) -> None:
    tables = load_config(DEMO).model_dump()
    tables["model"] |= {"family": family, "config": {experts: 6, top_k: 2}}
    path = write(tmp_path, to_toml(tables))
    load_config(path)
    message = refusal(f"model.config.{experts}=7", f"model.config.{top_k}=8", path=path)
    assert f"model.config.{experts} (7) must be divisible by parallel.ep_degree (2)" in message
    assert f"model.config.{top_k} (8) must be at most model.config.{experts} (7)" in message


def test_family_without_a_default_number_of_experts_needs_one(tmp_path: Path) -> None:
    tables = load_config(DEMO).model_dump()
    tables["model"] |= {"family": "dots1", "config": {"vocab_size": 320}}
    message = refusal(path=write(tmp_path, to_toml(tables)))
    assert "model.config.n_routed_experts is missing: give the number of routed experts" in message
    assert "model.config.num_experts_per_tok is missing: give the number of experts per token" in message
