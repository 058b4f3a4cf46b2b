"""BalanceCallback in transformers' Trainer on several ranks: DistributedDataParallel, and DeepSpeed with its AutoEP."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.tiny_families import family_model
from test_trainer_callback import (
    LEARNING_RATE,
    RATE,
    STEPS,
    InOrderTrainer,
    Watching,
    arguments,
    plain_loop,
    rows,
    start_model,
)
from test_trainer_callback_families import rows as family_rows

from alfb_dist.engine.initialize import quiet, start_without_compiler
from alfb_dist.training.trainer_callback import BalanceCallback

DEEPSPEED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
    "expert_parallel": {"enabled": True, "autoep_size": 2, "use_grouped_mm": False},
}


def train(deepspeed: bool) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # of accelerate and torch, about pinned memory and renamed collectives
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    more: dict[str, Any] = {"deepspeed": DEEPSPEED} if deepspeed else {"ddp_find_unused_parameters": False}
    if deepspeed:
        start_without_compiler()
        quiet(40)
    callback, watching = BalanceCallback(rate=RATE), Watching()
    folder = Path(tempfile.mkdtemp(prefix="trainer-"))
    given = arguments(folder, per_device_train_batch_size=1, save_strategy="steps", save_steps=2, **more)
    data = rows()
    run = InOrderTrainer(
        start_model(), given, train_dataset=data, eval_dataset=data[:4], callbacks=[watching, callback]
    )
    run.train()
    assert callback.balancer is not None
    layers = {type(m).__name__ for m in run.model.modules()} & {"AutoEPMoELayer", "DeepseekV3MoE"}
    return {
        "biases": watching.biases,
        "load": callback.balancer.load_LE,
        "wrapped": type(run.model_wrapped).__name__,
        "layers": layers,
        "logged": [log["max_violation_batch"] for log in run.state.log_history if "loss" in log],
    }


def check(by_rank: list[dict[str, Any]]) -> None:
    expected = plain_loop()
    for seen in by_rank:
        assert len(seen["biases"]) == len(seen["logged"]) == STEPS
        for bias_LE, plain in zip(seen["biases"], expected, strict=True):
            assert torch.equal(bias_LE.view(torch.int32), plain["bias"].view(torch.int32))
        assert torch.equal(seen["load"], expected[-1]["load"])


def test_bias_equals_a_plain_loops_in_data_parallel(ranks: Callable[..., list[Any]]) -> None:
    by_rank = ranks(2, train, False)
    check(by_rank)
    assert {seen["wrapped"] for seen in by_rank} == {"DistributedDataParallel"}


def test_bias_equals_a_plain_loops_on_deepspeed_with_autoep(ranks: Callable[..., list[Any]]) -> None:
    by_rank = ranks(2, train, True)
    check(by_rank)
    assert {seen["wrapped"] for seen in by_rank} == {"DeepSpeedEngine"}
    assert all(seen["layers"] == {"AutoEPMoELayer"} for seen in by_rank)


def resume_without_native_bias(folder: Path) -> list[torch.Tensor]:
    """Return the biases after a whole training, and after one resumed from its checkpoint."""
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    start_without_compiler()
    quiet(50)
    config = {**DEEPSPEED, "expert_parallel": {**DEEPSPEED["expert_parallel"], "preset_model": "mixtral"}}
    seen = []
    for where, resumed in (("straight", None), ("resumed", folder / "straight" / "checkpoint-2")):
        given = arguments(folder / where, per_device_train_batch_size=1, deepspeed=config, save_strategy="steps")
        given.save_steps, given.max_steps, callback = 2, 3, BalanceCallback(rate=RATE)
        model, (data, _) = family_model("qwen3_moe", 3), family_rows()
        run = InOrderTrainer(model, given, train_dataset=data, eval_dataset=data[:2], callbacks=[callback])
        run.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        assert callback.balancer is not None
        seen.append(callback.balancer.bias_LE)
    return seen


def test_training_on_autoep_resumes_with_a_bias_that_the_family_lacks(
    ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    for straight, resumed in ranks(2, resume_without_native_bias, tmp_path):
        assert straight.any() and torch.equal(straight, resumed)
