"""The DeepSpeed dict that a run derives, and the learning rate's schedule."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_model

import alfb_dist
from alfb_dist.config import ConfigError, load_config
from alfb_dist.engine.balancer import rate_of
from alfb_dist.engine.balancing import Balancing
from alfb_dist.engine.ds_config import (
    check_ds_config,
    derive_ds_config,
    lr_factor,
    read_ds_config,
    with_defaults,
    with_section,
)
from alfb_dist.moe.sharding import Sharding

TEST_CONFIG = Path(__file__).parents[2] / "configs" / "test.toml"


def test_our_tables_decide_and_the_deepspeed_table_passes_through() -> None:
    config = load_config(
        TEST_CONFIG,
        [
            "optimizer.clip=0.5",
            "model.dtype='bfloat16'",
            "deepspeed.zero_optimization.stage=2",
            "train.global_batch=16",
        ],
    )
    derived = derive_ds_config(config, 2)
    assert derived["train_micro_batch_size_per_gpu"] == 2
    assert derived["gradient_accumulation_steps"] == 4
    assert derived["gradient_clipping"] == 0.5
    assert derived["bf16"] == {"enabled": True}
    assert derived["zero_optimization"] == {"stage": 2}
    assert derived["optimizer"]["params"]["torch_adam"] is True
    check_ds_config(derived)


def test_learning_rate_warms_up_and_decays_to_its_last_ratio() -> None:
    settings = ["train.steps=12", "optimizer.warmup_steps=4", "optimizer.min_lr_ratio=0.2"]
    config = load_config(TEST_CONFIG, settings)
    factors = [lr_factor(config, step) for step in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[8] == pytest.approx(0.6)  # half-way down from 1 to 0.2
    assert factors[12] == pytest.approx(0.2)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    constant = load_config(TEST_CONFIG, [*settings, "optimizer.schedule='constant'"])
    assert lr_factor(constant, 11) == 1.0


def test_adam_on_a_cpu_is_torchs_unless_said_otherwise() -> None:
    given = {"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}
    assert with_defaults(given)["optimizer"]["params"] == {"lr": 1.0, "torch_adam": True, "fused": True}
    assert "torch_adam" not in given["optimizer"]["params"]  # the user's dict stays as it was
    chosen = {"optimizer": {"type": "Adam", "params": {"torch_adam": False}}}
    assert with_defaults(chosen)["optimizer"]["params"] == {"torch_adam": False}
    each = {"optimizer": {"type": "Adam", "params": {"foreach": True}}}
    assert with_defaults(each)["optimizer"]["params"] == {"foreach": True, "torch_adam": True, "fused": False}
    assert with_defaults({"optimizer": {"type": "SGD", "params": {}}})["optimizer"]["params"] == {}


# DeepSpeed's own file, merged into ours.


def json_file(folder: Path, **keys: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps(keys))
    return path


def both(folder: Path, overrides: Sequence[str] = (), *, without: str = "", world_size: int = 2, **keys: Any) -> Any:
    """Load configs/test.toml, less the lines that begin with the pattern, together with a DeepSpeed file."""
    toml = folder / "run.toml"
    lines = TEST_CONFIG.read_text().splitlines()
    toml.write_text("\n".join(line for line in lines if not without or not re.match(without, line)))
    return load_config(toml, overrides, world_size=world_size, deepspeed_json=json_file(folder, **keys))


def test_a_deepspeed_file_sets_what_the_toml_leaves_open(tmp_path: Path) -> None:
    config = both(
        tmp_path,
        without="micro_batch|global_batch|lr|warmup_steps|rate",
        train_micro_batch_size_per_gpu=4,
        gradient_accumulation_steps=3,
        gradient_clipping=0.25,
        bf16={"enabled": True},
        optimizer={"type": "AdamW", "params": {"lr": 0.5, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0}},
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_max_lr": 0.5, "warmup_min_lr": 0}},
        zero_optimization={"stage": 1, "reduce_bucket_size": 12345},
        steps_per_print=7,
        alf_lb={"rate": 0.125, "rule": "rms", "centered": True, "ep_degree": 2, "mode": "recentre"},
    )
    derived = derive_ds_config(config, 2)
    assert (derived["train_micro_batch_size_per_gpu"], derived["gradient_accumulation_steps"]) == (4, 3)
    assert config.train.global_batch == 4 * 3 * 2
    assert derived["gradient_clipping"] == 0.25 and derived["bf16"] == {"enabled": True}
    assert derived["steps_per_print"] == 7
    assert derived["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 12345}
    adamw = config.optimizer
    assert (adamw.lr, adamw.betas, adamw.eps, adamw.weight_decay) == (0.5, (0.8, 0.9), 1e-6, 0)
    assert (adamw.schedule, adamw.warmup_steps) == ("constant", 3)
    balance = config.balance
    assert (balance.rate, balance.rule, balance.centered, balance.mode) == (0.125, "rms", True, "recentre")


def test_auto_is_the_tomls_value_or_the_default(tmp_path: Path) -> None:
    auto = "auto"
    config = both(
        tmp_path,
        train_micro_batch_size_per_gpu=auto,
        train_batch_size=auto,
        gradient_accumulation_steps=auto,
        gradient_clipping=auto,
        bf16={"enabled": auto},
        fp16={"enabled": auto, "loss_scale": 0},
        optimizer={"type": auto, "params": {"lr": auto, "betas": auto, "eps": auto, "weight_decay": auto}},
        scheduler={"type": "WarmupCosineLR", "params": {"warmup_num_steps": auto, "total_num_steps": auto}},
        zero_optimization={"stage": 1, "reduce_bucket_size": auto, "stage3_prefetch_bucket_size": auto},
        steps_per_print=auto,
        alf_lb={"rate": auto},
    )
    assert config == load_config(TEST_CONFIG)


def test_comments_are_read_as_deepspeed_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{\n  // clip\n  "gradient_clipping": 0.5, # more\n  "zero_optimization": {"stage": 1}\n}')
    assert load_config(TEST_CONFIG, deepspeed_json=path).optimizer.clip == 0.5


CONTRADICTIONS = {
    "micro-batch": ({"train_micro_batch_size_per_gpu": 4}, r"train\.micro_batch \(2\) and train_micro_batch.* \(4\)"),
    "batch": ({"train_batch_size": 16}, r"train\.global_batch \(8\) and train_batch_size \(16\)"),
    "accumulation": ({"gradient_accumulation_steps": 4}, r"train\.global_batch \(8\) and gradient_accum.*\(16\)"),
    "rate": ({"alf_lb": {"rate": 0.5}}, r"balance\.rate \(0\.01\) and alf_lb\.rate \(0\.5\)"),
    "lr": ({"optimizer": {"params": {"lr": 1.5}}}, r"optimizer\.lr \(0\.003\) and optimizer\.params\.lr \(1\.5\)"),
    "zero": ({"zero_optimization": {"stage": 2}}, r"zero_optimization\.stage \(1\) and the same key \(2\)"),
    "steps": ({"scheduler": {"params": {"total_num_steps": 9}}}, r"train\.steps \(6\) and scheduler.*steps \(9\)"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_files_that_contradict_each_other_are_refused_with_both_values(case: str, tmp_path: Path) -> None:
    keys, words = CONTRADICTIONS[case]
    with pytest.raises(ConfigError, match=rf"{words} in .*ds\.json contradict each other"):
        both(tmp_path, **keys)


MISTAKES = {
    "spelling": ({"zero_optimisation": {"stage": 1}}, r"zero_optimisation: unknown key.*zero_optimization\?"),
    "negative clip": ({"gradient_clipping": -1}, r"optimizer\.clip \(-1\) must be.*from gradient_clipping in"),
    "section key": ({"alf_lb": {"rates": 1}}, r"alf_lb\.rates: unknown key.*did you mean alf_lb\.rate\?"),
    "section value": ({"alf_lb": {"zero_at_step": -1}}, r"balance\.zero_at_step \(-1\).*from alf_lb\.zero_at_step"),
    "section of no table": ({"alf_lb": 3}, r"alf_lb \(3\) in .* must be a table"),
    "optimizer": ({"optimizer": {"type": "Lamb"}}, r'optimizer\.type \("Lamb"\) in .* must be "AdamW"'),
    "Adam without decoupled decay": ({"optimizer": {"params": {"adam_w_mode": False}}}, "adam_w_mode"),
    "optimizer key": ({"optimizer": {"params": {"learning_rate": 1}}}, r"params\.learning_rate: unsupported key"),
    "scheduler": ({"scheduler": {"type": "OneCycle"}}, r'scheduler\.type \("OneCycle"\).*WarmupLR or WarmupCosineLR'),
    "warm-up": ({"scheduler": {"params": {"warmup_type": "log"}}}, r'warmup_type \("log"\) in .* must be "linear"'),
    "fp16": ({"fp16": {"enabled": True}}, "fp16 .* must be disabled"),
    "bf16": ({"bf16": {"enabled": 1}}, "bf16.enabled .* must be true, false"),
    "stage 3": ({"zero_optimization": {"stage": 3}}, "ZeRO-3|contradict"),
    "expert parallelism": ({"expert_parallel": {"enabled": True}}, "parallel.ep_degree"),
    "accumulation": ({"gradient_accumulation_steps": 0}, r"gradient_accumulation_steps \(0\)"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_that_deepspeed_would_ignore_are_refused(case: str, tmp_path: Path) -> None:
    keys, words = MISTAKES[case]
    with pytest.raises(ConfigError, match=words):
        both(tmp_path, without="stage|clip", **keys)


@pytest.mark.parametrize(
    ("text", "words"),
    [("[1]", "must contain a JSON object"), ('{"a": ', "ds.json"), ('{"a": 1, "a": 2}', "duplicate key a")],
)
def test_a_file_that_is_not_a_configuration_is_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(TEST_CONFIG, deepspeed_json=tmp_path / "ds.json")
    with pytest.raises(ConfigError, match=r"missing\.json: cannot be read"):
        load_config(TEST_CONFIG, deepspeed_json=tmp_path / "missing.json")


def test_accumulation_contradicts_nothing_before_the_number_of_ranks_is_known(tmp_path: Path) -> None:
    keys = {"gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 2}
    path = json_file(tmp_path, **keys)
    assert load_config(TEST_CONFIG, deepspeed_json=path).train.global_batch == 8  # right for four ranks
    assert load_config(TEST_CONFIG, deepspeed_json=path, world_size=4).train.global_batch == 8


# In a user's own script.


def test_a_key_that_deepspeed_would_ignore_is_refused_in_a_dict_too() -> None:
    with pytest.raises(ValueError, match=r"zero_optimisation: unknown key.*did you mean zero_optimization\?"):
        check_ds_config({"zero_optimisation": {"stage": 1}})
    with pytest.raises(ValueError, match=r"gradient_clipping \(-1\) must be at least 0"):
        check_ds_config({"gradient_clipping": -1})
    check_ds_config({"something_of_a_plugin": 1})


def test_section_replaces_arguments_and_must_not_contradict_them() -> None:
    sharding, balancing = Sharding(ep_degree=2), Balancing()
    assert with_section(sharding, {}) == sharding and with_section(balancing, {}) == balancing
    section = {"rule": "rms", "ep_degree": 2, "max_rows": 8}
    assert with_section(balancing, section) == Balancing(rule="rms")
    assert with_section(sharding, section) == Sharding(ep_degree=2, max_rows=8)
    with pytest.raises(ValueError, match=r"ep_degree \(2\) and alf_lb\.ep_degree \(4\) contradict"):
        with_section(sharding, {"ep_degree": 4})
    with pytest.raises(ValueError, match=r"rule \('rms'\) and alf_lb\.rule \('sign'\) contradict"):
        with_section(Balancing(rule="rms"), {"rule": "sign"})
    scheduled = with_section(balancing, {"rate": 0.5, "warmup_steps": 2, "zero_at_step": 5, "mode": "auto"})
    assert [rate_of(scheduled)(step) for step in range(6)] == [0.25, 0.5, 0.5, 0.5, 0.5, 0.0]
    assert scheduled.mode == "train"
    with pytest.raises(ValueError, match="rate is a function: leave warmup_steps and zero_at_step out"):
        with_section(Balancing(rate=lambda step: 0.5), {"warmup_steps": 2})
    with pytest.raises(ConfigError, match=r"did you mean alf_lb\.rate\?"):
        read_ds_config({"alf_lb": {"rat": 1}})


def initialized(folder: str) -> tuple[Any, ...]:
    section = {"ep_degree": 2, "rule": "rms", "rate": 0.25, "centered": True}
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3}}
    path = json_file(Path(folder), train_micro_batch_size_per_gpu=1, optimizer=optimizer, alf_lb=section)
    engine, balancer = alfb_dist.initialize(tiny_model(), path)
    experts = next(m for m in engine.module.modules() if getattr(m, "grid", None) is not None)
    with pytest.raises(ValueError, match="ep_degree is missing"):
        alfb_dist.initialize(tiny_model(), {"train_micro_batch_size_per_gpu": 1})
    return experts.sharding.ep_degree, experts.grid.ep_degree, balancer.rule, balancer.rate, balancer.centered


def test_initialize_takes_a_file_with_the_section(ranks: Any, tmp_path: Path) -> None:
    expected = (2, 2, "rms", 0.25, True)
    assert ranks(2, initialized, str(tmp_path)) == [expected] * 2
