"""Configuration: what is right is accepted and written back; what is wrong is refused with key path, rule and values."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import random
import re
import string
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alfb_dist.config import TABLES, Config, ConfigError, config_to_toml, describe_fields, load_config
from alfb_dist.config_keys import DEEPSPEED_KEYS, DERIVED_KEYS, ZERO_KEYS, family_keys
from alfb_dist.config_text import to_toml

CONFIGS = Path(__file__).parent.parent / "configs"
DEMO = CONFIGS / "demo.toml"


def refusal(*overrides: str, path: Path = DEMO, world_size: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=world_size)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


# --- What is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "world"), [("demo", 2), ("test", 2), ("moonlight-16b-a3b", 64)])
def test_shipped_configuration_is_accepted(name: str, world: int) -> None:
    config = load_config(CONFIGS / f"{name}.toml", world_size=world)
    assert config.run.name == name
    text = (CONFIGS / f"{name}.toml").read_text()
    assert text.startswith("# ")
    assert f"launch/train.py --config configs/{name}.toml" in text


def test_demo_has_three_expert_layers_and_4096_tokens_a_step() -> None:
    config = load_config(DEMO, world_size=2)
    model = config.model.config
    assert model["num_hidden_layers"] - model["first_k_dense_replace"] == 3
    assert (model["n_routed_experts"], model["num_experts_per_tok"], config.parallel.ep_degree) == (16, 4, 2)
    assert config.train.global_batch * config.data.sequence_length == 4096


def test_configuration_written_as_toml_loads_equal(tmp_path: Path) -> None:
    overrides = (
        'run.folder="a \\"quoted\\" \\\\ path é \\u007f\\n"',
        "model.config.rope_parameters={rope_type='default', rope_theta=1e4}",
        "model.config.q_lora_rank=null",
        "optimizer.eps=1e-30",
        "deepspeed.comms_logger={enabled=false, prof_ops=['a','b']}",
        "deepspeed.data_types.grad_accum_dtype=fp32",
        "deepspeed.compile={}",
    )
    for config in (load_config(CONFIGS / "moonlight-16b-a3b.toml"), load_config(DEMO, overrides)):
        again = load_config(write(tmp_path, config_to_toml(config)))
        assert again == config
        assert again.hash() == config.hash()
        assert config_to_toml(again) == config_to_toml(config)


def test_configuration_stored_as_json_is_accepted_again() -> None:
    config = load_config(DEMO)
    assert Config.model_validate(json.loads(config.model_dump_json())) == config


def test_null_in_toml_is_none() -> None:
    config = load_config(DEMO, ["model.config.q_lora_rank=null", "balance.zero_at_step=null"])
    assert config.model.config["q_lora_rank"] is None
    assert config.balance.zero_at_step is None
    assert 'q_lora_rank = "null"' in config_to_toml(config)


def test_whole_number_is_accepted_for_a_float_and_only_there() -> None:
    config = load_config(DEMO, ["optimizer.clip=1", "balance.rate=0", "optimizer.betas=[0, 0.5]"])
    assert (config.optimizer.clip, config.balance.rate, config.optimizer.betas) == (1.0, 0.0, (0.0, 0.5))
    assert isinstance(config.optimizer.clip, float)
    assert "train.steps (2.0) must be a valid integer" in refusal("train.steps=2.0")
    assert 'train.steps ("2") must be a valid integer' in refusal('train.steps="2"')
    assert "optimizer.lr (true) must be a valid number" in refusal("optimizer.lr=true")


def test_configuration_cannot_be_changed() -> None:
    config = load_config(DEMO)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def test_hash_depends_on_every_setting_but_resume() -> None:
    config = load_config(DEMO)
    assert re.fullmatch("[0-9a-f]{16}", config.hash())
    assert load_config(DEMO, ["run.resume=true"]).hash() == config.hash()
    changed = ["run.seed=1", "model.config.hidden_size=64", "deepspeed.zero_optimization.stage=2", "report.html=false"]
    assert len({config.hash(), *(load_config(DEMO, [change]).hash() for change in changed)}) == 5


def test_gradient_accumulation_splits_the_global_batch_exactly() -> None:
    config = load_config(DEMO, ["train.global_batch=48", "train.micro_batch=4"])
    assert [config.gradient_accumulation(world) for world in (2, 4, 6, 12)] == [6, 3, 2, 1]
    with pytest.raises(ConfigError, match=r"train\.global_batch \(48\) must be divisible by .* = 32"):
        config.gradient_accumulation(8)


def test_every_field_is_described() -> None:
    table = describe_fields()
    for name, model in TABLES.items():
        for key, field in model.model_fields.items():
            assert field.description
            assert f"| {name}.{key} |" in table
    assert "| balance.rate | float | 0.001 | >= 0, <= 1 |" in table
    assert '| model.dtype | "float32" or "bfloat16" | "float32" |' in table
    assert len({line.count(" |") for line in table.splitlines()[2:]}) == 1


# --- Overrides --------------------------------------------------------------------------------------------------------


def test_override_value_is_toml_or_else_a_bare_string() -> None:
    overrides = (
        "run.name=other",
        "train.steps = 300",
        "report.progress=false",
        'data.source=["a", "b c"]',
        "data.tokenizer='tok.json'",
        "model.config.hidden_size=64",
        "deepspeed.zero_optimization.stage=2",
        "deepspeed.flops_profiler.enabled=true",
        "run.folder=a=b",
    )
    config = load_config(DEMO, overrides)
    assert (config.run.name, config.train.steps, config.report.progress) == ("other", 300, False)
    assert (config.data.source, config.data.tokenizer) == (("a", "b c"), "tok.json")
    assert (config.model.config["hidden_size"], config.model.config["vocab_size"]) == (64, 320)
    assert config.deepspeed == {"zero_optimization": {"stage": 2}, "flops_profiler": {"enabled": True}}
    assert config.run.folder == "a=b"


def test_last_override_wins() -> None:
    assert load_config(DEMO, ["train.steps=21", "train.steps=22"]).train.steps == 22


def test_override_of_several_lines_sets_one_key() -> None:
    assert load_config(DEMO, ["run.folder=1\nseed = 7"]).run.folder == "1\nseed = 7"


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", "train.=3"])
def test_malformed_override_is_refused(override: str) -> None:
    assert refusal(override) == f"--set {override}: must have the form table.key=value"


def test_override_of_an_unknown_key_names_the_nearest() -> None:
    assert refusal("train.stpes=3") == "train.stpes is no key of [train]; did you mean train.steps?"
    assert refusal("trian.steps=3") == "trian is no key of a configuration; did you mean train?"
    assert refusal("run.steps=3") == "run.steps is no key; did you mean train.steps?"
    assert "did you mean balance.warmup_steps or optimizer.warmup_steps?" in refusal("train.warmup_steps=3")
    assert "report.zzz is no key of [report]; keys: log_interval, progress, wandb, " in refusal("report.zzz=3")


def test_override_through_a_value_is_refused() -> None:
    assert "train.steps ({x = 1}) must be a valid integer" in refusal("train.steps.x=1")


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b"[run]\nname = \n", "line 2, column 8: Invalid value"),
        (b"[run]\nname = 'a'\nname = 'b'\n", "line 3, column 11: Cannot overwrite a value"),
        (b"[run]\n\nname = 'a", "line 3"),
        (b"[run]\nname = '\xff'\n", "line 2: not UTF-8 text (byte 0xff)"),
    ],
)
def test_syntax_error_names_file_and_line(tmp_path: Path, text: bytes, place: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(text)
    assert refusal(path=path).startswith(f"{path}, {place}")


def test_missing_file_says_so_and_names_the_nearest(tmp_path: Path) -> None:
    assert refusal(path=CONFIGS / "dmeo.toml") == f"{CONFIGS}/dmeo.toml: there is no such file; did you mean {DEMO}?"
    assert refusal(path=tmp_path / "x.toml") == f"{tmp_path}/x.toml: there is no such file"
    assert refusal(path=tmp_path) == f"{tmp_path}: cannot be read (Is a directory)"


def test_pretrained_folder_counts_instead_of_a_config(tmp_path: Path) -> None:
    model = {"model_type": "deepseek_v3", **load_config(DEMO).model.config}
    tables = load_config(DEMO).model_dump()
    tables["model"] |= {"config": {}, "path": str(tmp_path)}
    path = write(tmp_path, to_toml(tables))
    assert f'model.path ("{tmp_path}") must be a folder with a transformers config.json' in refusal(path=path)
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert load_config(path).model.path == str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model | {"n_routed_experts": 7, "vocab_size": 256}))
    message = refusal(path=path)
    assert "config.json of model.path: n_routed_experts (7) must be divisible by parallel.ep_degree (2)" in message
    assert "config.json of model.path: vocab_size (256) must be at least 257" in message
    (tmp_path / "config.json").write_text("[1]")
    assert "holds no JSON object" in refusal(path=path)


# --- Relations --------------------------------------------------------------------------------------------------------

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
        "model.config.num_experts_per_tok (4) must be at most model.config.topk_group (1) x 2 experts a group = 2: "
        "choose at least 2 groups",
    ),
    (
        ["model.config.n_group=16", "model.config.topk_group=8"],
        "model.config.n_routed_experts (16) must be at least twice model.config.n_group (16): a group is scored by its "
        "two best experts; take at most 8 groups",
    ),
    (
        ["model.config.first_k_dense_replace=4"],
        "model.config.first_k_dense_replace (4) must be less than model.config.num_hidden_layers (4): without a layer "
        "of experts there is nothing to balance",
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
        "model.config.num_local_experts (16) and model.config.n_routed_experts (16) are one setting: keep one",
    ),
    (
        ["model.config.routed_scaling_factor=1"],
        "model.config.routed_scaling_factor (1) must be a number: write 1.0",
    ),
    (["model.config.n_shared_experts=-1"], "model.config.n_shared_experts (-1) must be at least 0"),
    (["model.config.dtype=bfloat16"], 'model.config.dtype ("bfloat16") is set by model.dtype: remove it'),
    (
        ["model.family=deepseek_v33"],
        'model.family ("deepseek_v33") is no model_type of the installed transformers; did you mean "deepseek_v3"?',
    ),
    (["model.family=../.."], 'model.family ("../..") is no model_type of the installed transformers; for example'),
    (["model.family=gpt2"], 'model.family ("gpt2") declares no routed experts; '),
    (
        ["model.config={}"],
        "model.config is missing: give [model.config] to start from random weights, or model.path to go on",
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


def test_value_left_out_counts_with_the_default_of_the_family(tmp_path: Path) -> None:
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
def test_expert_count_has_the_name_of_its_family(tmp_path: Path, family: str, experts: str, top_k: str) -> None:
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
    assert "model.config.num_experts_per_tok is missing: give the number of experts a token" in message


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(DERIVED_KEYS))
def test_deepspeed_key_that_is_derived_is_refused_with_the_key_that_sets_it(key: str) -> None:
    assert refusal(f"deepspeed.{key}=1") == f"deepspeed.{key} (1) is derived: remove it and set {DERIVED_KEYS[key]}"


def test_deepspeed_misspelling_is_refused_with_the_nearest_key() -> None:
    expected = "deepspeed.zero_optimisation is no key of DeepSpeed; did you mean deepspeed.zero_optimization?"
    assert refusal("deepspeed.zero_optimisation.stage=1") == expected
    expected = "did you mean deepspeed.zero_optimization.reduce_bucket_size?"
    assert expected in refusal("deepspeed.zero_optimization.reduce_buckets_size=1")


def test_zero_stage_3_is_refused_with_its_reason() -> None:
    expected = "ZeRO-3 partitions expert parameters that expert parallelism already shards; use stage 1 or 2"
    assert refusal("deepspeed.zero_optimization.stage=3").endswith(expected)
    for stage in ("4", "-1", "true", "1.0", "'1'"):
        assert "deepspeed.zero_optimization.stage (" in refusal(f"deepspeed.zero_optimization.stage={stage}")
    for good in (0, 1, 2):
        zero = load_config(DEMO, [f"deepspeed.zero_optimization.stage={good}"]).deepspeed["zero_optimization"]
        assert zero == {"stage": good}


def test_deepspeed_value_of_a_wrong_kind_is_refused() -> None:
    assert 'deepspeed.steps_per_print ("x") must be an integer' in refusal("deepspeed.steps_per_print=x")
    assert "deepspeed.dump_state (1) must be true or false" in refusal("deepspeed.dump_state=1")
    assert "deepspeed.zero_optimization (true) must be a table" in refusal("deepspeed.zero_optimization=true")
    message = refusal("deepspeed.zero_optimization.reduce_bucket_size=-5e8")
    assert "deepspeed.zero_optimization.reduce_bucket_size (-500000000.0) must be a whole number" in message
    assert "must be a number, a string, true, false, a list or a table" in refusal("deepspeed.timers.x=2020-01-01")
    assert "deepspeed.timers.x (inf) must be a finite number" in refusal("deepspeed.timers.x=inf")
    load_config(DEMO, ["deepspeed.zero_optimization.reduce_bucket_size=5e8"])


def test_known_deepspeed_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    read: dict[str, Any] = {}

    class Recorder(dict):  # type: ignore[type-arg]
        def get(self, key: str, default: Any = None) -> Any:
            read[key] = default
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            read.setdefault(str(key), None)
            return super().__contains__(key)

        def keys(self) -> Any:  # DeepSpeed asks `key in config.keys()` too
            return self

    DeepSpeedConfig(Recorder(train_micro_batch_size_per_gpu=1))
    removed, outside = set(_REMOVED_TOP_LEVEL_CONFIG_KEYS), {"sequence_parallel_size"}  # the latter: with ranks only
    assert set(read) - removed == (set(DEEPSPEED_KEYS) | set(DERIVED_KEYS)) - outside
    kinds = {"bool": bool, "int": int, "float": float, "str": str, "table": dict}
    defaults = {key: read[key] for key in set(DEEPSPEED_KEYS) & set(read) if read[key] is not None}
    assert len(defaults) > 15
    for key, default in defaults.items():
        assert isinstance(default, kinds[DEEPSPEED_KEYS[key]]), key

    fields = DeepSpeedZeroConfig.model_fields
    assert set(ZERO_KEYS) == set(fields) | {field.alias for field in fields.values() if field.alias}
    for key, field in fields.items():
        for kind in ("bool", "int"):
            assert (kind in str(field.annotation) and key != "stage") == (ZERO_KEYS[key] == kind and key != "stage"), (
                key
            )


# --- Transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    ["deepseek_v3", "deepseek_v32", "glm4_moe", "glm_moe_dsa", "dots1", "minimax_m2", "ernie4_5_moe", "mixtral"],
)
def test_keys_read_from_source_are_those_of_the_configuration_class(family: str) -> None:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    keys, declared = family_keys(family), CONFIG_MAPPING[family]
    assert keys is not None
    own = {field.name: field for field in dataclasses.fields(declared)}
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    assert set(own) - base <= set(keys.kinds)
    assert set(keys.kinds) <= set(own) | set(vars(declared)) | set(declared.__annotations__)
    assert keys.synonyms == declared.attribute_map
    for key, default in keys.defaults.items():
        if key in own:
            assert own[key].default == default, key


# --- Refusals in all their kinds --------------------------------------------------------------------------------------

BASE = load_config(
    DEMO,
    [
        "balance.zero_at_step=150",
        "balance.warmup_steps=10",
        "data.validation_source=['b']",
        "model.config.hidden_act=silu",
        "deepspeed.steps_per_print=10",
        "deepspeed.zero_optimization.overlap_comm=true",
    ],
).model_dump()
FREE = {"model.config": family_keys("deepseek_v3"), "deepspeed": None, "deepspeed.zero_optimization": None}
REQUIRED = "optimizer.lr data.source data.sequence_length train.steps train.global_batch train.micro_batch".split()
OUT_OF_RANGE: dict[str, list[Any]] = {
    "run.name": ["", "a/b", "..", "-x", "a b", "x" * 101],
    "run.folder": [""],
    "run.seed": [-1, 2**32],
    "run.timeout_seconds": [0.0, -1.0, float("inf"), float("nan")],
    "model.attention": ["flash", ""],
    "model.dtype": ["bf16", "float16"],
    "parallel.ep_degree": [0, -2],
    "balance.rule": ["sgn", "SIGN", "quantile"],
    "balance.rate": [-0.001, 1.5, float("nan")],
    "balance.warmup_steps": [-1],
    "balance.zero_at_step": [0, -1],
    "balance.sequence_loss_alpha": [-0.1, 2.0],
    "balance.batch_loss_alpha": [-0.1],
    "optimizer.lr": [0.0, -1e-3, float("inf")],
    "optimizer.betas": [[0.9, 1.0], [-0.1, 0.9], [0.9], [0.9, 0.95, 0.99]],
    "optimizer.eps": [0.0, -1e-8],
    "optimizer.weight_decay": [-0.1],
    "optimizer.clip": [-1.0],
    "optimizer.warmup_steps": [-1],
    "optimizer.schedule": ["linear"],
    "optimizer.min_lr_ratio": [-0.1, 1.1],
    "data.source": [[], [""]],
    "data.tokenizer": [""],
    "data.sequence_length": [1, 0, -4, 2**25],
    "data.layout": ["pack"],
    "data.validation_fraction": [0.0, 1.0, -0.5],
    "data.cache": [""],
    "train.steps": [0, -5],
    "train.global_batch": [0, -16],
    "train.micro_batch": [0, -1],
    "train.activation_checkpointing": ["full", "non_reentrant"],
    "train.eval_interval": [-1],
    "train.eval_sequences": [0],
    "train.checkpoint_interval": [-1],
    "train.keep_checkpoints": [0],
    "train.max_skipped_steps": [0],
    "report.log_interval": [0],
    "report.wandb": ["on"],
    "report.wandb_project": [""],
    "model.config.vocab_size": [0, 256],
    "model.config.hidden_size": [0, -128],
    "model.config.num_hidden_layers": [0],
    "model.config.n_routed_experts": [0, -16],
    "model.config.num_experts_per_tok": [0, 17],
    "model.config.n_group": [0],
    "model.config.topk_group": [0, 2],
    "model.config.first_k_dense_replace": [-1, 4, 5],
    "model.config.n_shared_experts": [-1],
    "deepspeed.zero_optimization.stage": [3, -1, 4],
}
INDIVISIBLE: dict[str, Callable[[random.Random], int]] = {
    "model.config.n_routed_experts": lambda rng: rng.randrange(5, 200, 2),
    "train.global_batch": lambda rng: 16 * rng.randrange(1, 50) + rng.randrange(1, 16),
    "parallel.ep_degree": lambda rng: rng.choice([3, 5, 6, 7]),
    "model.config.n_group": lambda rng: rng.choice([3, 5, 6, 7]),
    "model.config.num_key_value_heads": lambda rng: rng.choice([3, 5, 8]),
}

Mutation = tuple[dict[str, Any], str, str]  # the tables, and the key path and name that the message has to hold


def leaves(tables: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def parent_of(tables: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    *parents, key = path.split(".")
    for parent in parents:
        tables = tables[parent]
    return tables, key


def valid_names(parent: str) -> set[str]:
    if parent == "model.config":
        keys = family_keys("deepseek_v3")
        assert keys is not None
        return set(keys.names)
    names = {
        "": set(Config.model_fields),
        "deepspeed": set(DEEPSPEED_KEYS),
        "deepspeed.zero_optimization": set(ZERO_KEYS),
    }
    return names.get(parent) or set(TABLES[parent].model_fields)


def typo(name: str, taken: set[str], rng: random.Random) -> str:
    while True:
        at = rng.randrange(len(name))
        letter = rng.choice(string.ascii_lowercase)
        wrong = rng.choice(
            [
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at:],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
            ]
        )
        if wrong and wrong not in taken:
            return wrong


def misspell_key(tables: dict[str, Any], rng: random.Random) -> Mutation:
    path = rng.choice([*leaves(tables), *TABLES, "deepspeed.zero_optimization"])
    parent, key = parent_of(tables, path)
    prefix = path.removesuffix(key).removesuffix(".")
    wrong = typo(key, valid_names(prefix), rng)
    parent[wrong] = parent.pop(key)
    return tables, f"{prefix}.{wrong}".removeprefix("."), key


def wrong_type(tables: dict[str, Any], rng: random.Random) -> Mutation:
    path = rng.choice(list(leaves(tables)))
    parent, key = parent_of(tables, path)
    others: list[tuple[type, list[Any]]] = [
        (bool, [1, "true", [True]]),
        (int, ["3", 1.5, True, [1]]),
        (float, ["0.1", True, [0.1]]),
        (str, [3, True, ["x"], {"a": 1}]),
        (tuple, ["x", 3, {"a": 1}, [["x"]]]),
    ]
    parent[key] = rng.choice(next(values for kind, values in others if isinstance(parent[key], kind)))
    return tables, path, key


def out_of_range(tables: dict[str, Any], rng: random.Random) -> Mutation:
    path = rng.choice(list(OUT_OF_RANGE))
    parent, key = parent_of(tables, path)
    parent[key] = rng.choice(OUT_OF_RANGE[path])
    return tables, path, key


def indivisible(tables: dict[str, Any], rng: random.Random) -> Mutation:
    path = rng.choice(list(INDIVISIBLE))
    parent, key = parent_of(tables, path)
    parent[key] = INDIVISIBLE[path](rng)
    return tables, path, f"({parent[key]})"


def drop_required(tables: dict[str, Any], rng: random.Random) -> Mutation:
    path = rng.choice([*REQUIRED, "model.config", "model", "optimizer", "data", "train"])
    parent, key = parent_of(tables, path)
    del parent[key]
    return tables, path, "is missing"


def move_to_wrong_table(tables: dict[str, Any], rng: random.Random) -> Mutation:
    path = rng.choice([path for path in leaves(tables) if path.split(".")[0] in TABLES])
    parent, key = parent_of(tables, path)
    target = rng.choice([name for name in TABLES if key not in TABLES[name].model_fields])
    tables[target][key] = parent.pop(key)
    return tables, f"{target}.{key}", key


MUTATIONS = (misspell_key, wrong_type, out_of_range, indivisible, drop_required, move_to_wrong_table)


def test_unmutated_configuration_is_accepted(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, to_toml(BASE)), world_size=2).model_dump() == BASE


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_mutated_configuration_is_refused_with_its_key_path(
    mutate: Callable[[dict[str, Any], random.Random], Mutation], tmp_path: Path
) -> None:
    """84 or more of each of six kinds: over 500 in all."""
    rng = random.Random(f"alfb_dist {mutate.__name__}")
    for _ in range(84):
        tables, path, name = mutate(copy.deepcopy(BASE), rng)
        text = to_toml(tables)
        tomllib.loads(text)  # the file is well formed: it is the configuration that is refused
        message = refusal(path=write(tmp_path, text), world_size=2)
        lines = [line for line in message.splitlines() if path in line]
        assert lines, f"{path} is not named in: {message}"
        assert any(name in line.replace(path, "", 1) or name in line for line in lines), f"{name} not in {message}"


def test_every_problem_has_its_line() -> None:
    message = refusal("train.steps=0", "train.stpes=1", "model.config.n_routed_experts=7", "balance.rule=x", "nonsense")
    lines = message.splitlines()
    starts = ["--set nonsense", "balance.rule", "train.steps", "train.stpes", "model.config.n_routed_experts (7)"]
    assert [line.startswith(start) for line, start in zip(lines, starts)] == [True] * 5
    assert len(lines) == 5  # optimizer.warmup_steps > train.steps is silent: train.steps is reported already


def test_error_is_a_value_error_and_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("a", "b")))
    assert isinstance(error, ValueError)
    assert (str(error), error.problems) == ("a\nb", ("a", "b"))


def test_refusal_imports_nothing_heavy() -> None:
    program = """
import sys
from alfb_dist.config import ConfigError, load_config
try:
    load_config(sys.argv[1], ["model.family=deepseek_v33", "model.config.x=1"])
except ConfigError as error:
    print(error)
print(sorted({"torch", "numpy", "deepspeed", "transformers", "wandb", "rich"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program, str(DEMO)], capture_output=True, text=True, check=True)
    assert "did you mean" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
