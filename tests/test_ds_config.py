"""The DeepSpeed dict that a run derives, and the learning rate's course."""

from __future__ import annotations

from pathlib import Path

import pytest

from alfb_dist.config import load_config
from alfb_dist.ds_config import check_ds_config, derive_ds_config, lr_factor, with_defaults

TEST_CONFIG = Path(__file__).parent.parent / "configs" / "test.toml"


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


def test_learning_rate_warms_up_and_falls_to_its_last_part() -> None:
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
