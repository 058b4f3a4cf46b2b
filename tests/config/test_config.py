"""A valid configuration is accepted and written back; an invalid one is refused with key path, rule and values."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from alfb_dist.config import TABLES, Config, ConfigError, config_to_toml, describe_fields, load_config
from alfb_dist.config.keys import DERIVED_KEYS
from alfb_dist.config.text import to_toml

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = CONFIGS / "demo.toml"


def refusal(*overrides: str, path: Path = DEMO, world_size: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=world_size)
    return str(caught.value)


def write(directory: Path, text: str) -> Path:
    path = directory / "config.toml"
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
    assert refusal(override) == f"--set {override}: expected table.key=value"


def test_override_of_an_unknown_key_names_the_nearest() -> None:
    assert refusal("train.stpes=3") == "train.stpes: unknown key in [train]; did you mean train.steps?"
    assert refusal("trian.steps=3") == "trian: unknown key; did you mean train?"
    assert refusal("run.steps=3") == "run.steps: unknown key; did you mean train.steps?"
    assert "did you mean model.config.hidden_size?" in refusal("model.hidden_size=64")
    assert "did you mean balance.warmup_steps or optimizer.warmup_steps?" in refusal("train.warmup_steps=3")
    assert "report.zzz: unknown key in [report]; known keys: log_interval, progress, wandb, " in refusal("report.zzz=3")


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


def test_missing_file_is_reported_with_the_nearest_name(tmp_path: Path) -> None:
    assert refusal(path=CONFIGS / "dmeo.toml") == f"{CONFIGS}/dmeo.toml: no such file; did you mean {DEMO}?"
    assert refusal(path=tmp_path / "x.toml") == f"{tmp_path}/x.toml: no such file"
    assert refusal(path=tmp_path) == f"{tmp_path}: cannot be read (Is a directory)"


def test_rules_apply_to_the_config_of_a_pretrained_model(tmp_path: Path) -> None:
    model = {"model_type": "deepseek_v3", **load_config(DEMO).model.config}
    tables = load_config(DEMO).model_dump()
    tables["model"] |= {"config": {}, "path": str(tmp_path)}
    path = write(tmp_path, to_toml(tables))
    assert f'model.path ("{tmp_path}") must be a directory with a transformers config.json' in refusal(path=path)
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert load_config(path).model.path == str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model | {"n_routed_experts": 7, "vocab_size": 256}))
    message = refusal(path=path)
    assert "config.json of model.path: n_routed_experts (7) must be divisible by parallel.ep_degree (2)" in message
    assert "config.json of model.path: vocab_size (256) must be at least 257" in message
    (tmp_path / "config.json").write_text("[1]")
    assert "must contain a JSON object" in refusal(path=path)


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


def test_derived_deepspeed_keys_are_refused_with_the_keys_that_set_them() -> None:
    lines = refusal(*(f"deepspeed.{key}=1" for key in DERIVED_KEYS)).splitlines()
    assert lines == [f"deepspeed.{key} (1) is derived: remove it and set {ours}" for key, ours in DERIVED_KEYS.items()]


def test_deepspeed_misspelling_is_refused_with_the_nearest_key() -> None:
    expected = "deepspeed.zero_optimisation: unknown key of DeepSpeed; did you mean deepspeed.zero_optimization?"
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
    overlap = "deepspeed.zero_optimization.overlap_comm"
    assert f"{overlap} (1) must be true or false" in refusal(f"{overlap}=1")
    load_config(DEMO, [f"{overlap}=null"])
    assert "deepspeed.zero_optimization (true) must be a table" in refusal("deepspeed.zero_optimization=true")
    message = refusal("deepspeed.zero_optimization.reduce_bucket_size=-5e8")
    assert "deepspeed.zero_optimization.reduce_bucket_size (-500000000.0) must be a whole number" in message
    assert "must be a number, a string, true, false, a list or a table" in refusal("deepspeed.timers.x=2020-01-01")
    assert "deepspeed.timers.x (inf) must be a finite number" in refusal("deepspeed.timers.x=inf")
    assert 'deepspeed.timers ("null") must be a table' in refusal("deepspeed.timers=null")
    load_config(DEMO, ["deepspeed.zero_optimization.reduce_bucket_size=5e8"])


# --- Errors -----------------------------------------------------------------------------------------------------------


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
