"""BalanceCallback in trl's SFTTrainer: prompt tokens count, padding does not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support.tiny import biases, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import alfb_dist
from alfb_dist.training.trainer_callback import BalanceCallback

LENGTHS, TOP_K, RATE = [5, 3, 6, 2], 4, 0.05
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({str(i): i for i in range(61)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="1", eos_token="2")


def rows() -> Dataset:
    """Return tokenised sequences whose first half is a prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 61, (n,), generator=generator).tolist() for n in LENGTHS]
    labels = [[-100 if i < len(x) // 2 else token for i, token in enumerate(x)] for x in ids]
    return Dataset.from_list([{"input_ids": x, "labels": y} for x, y in zip(ids, labels)])


def fine_tuned(
    folder: Path, model: nn.Module, peft_config: Any = None, **overrides: Any
) -> tuple[Any, BalanceCallback]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    given: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    callback = BalanceCallback(rate=RATE)
    trainer = SFTTrainer(
        model,
        SFTConfig(str(folder), **{**given, **overrides}),
        train_dataset=rows(),
        processing_class=tokenizer(),
        callbacks=[callback],
        peft_config=peft_config,
    )
    trainer.train()
    return trainer, callback


VARIANTS: dict[str, dict[str, Any]] = {
    "whole model": {},
    "LoRA": {"peft_config": LoraConfig(r=2, target_modules=["o_proj"])},
    "without padding": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 8, "dataset_kwargs": {}},
    "packed and cut": {"packing": True, "packing_strategy": "wrapped", "max_length": 8, "dataset_kwargs": {}},
}


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")  # trl: this attention mixes packed sequences
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_real_token_counts_once_prompts_too(tmp_path: Path, variant: str) -> None:
    trainer, callback = fine_tuned(tmp_path, tiny_model(3), **VARIANTS[variant])
    balancer = callback.balancer
    assert balancer is not None and balancer.num_steps == 1
    assert balancer.load_LE.sum(1).tolist() == [sum(LENGTHS) * TOP_K] * 2
    moved_LE = alfb_dist.update_bias(torch.zeros(2, 8), balancer.load_LE, rate=RATE)
    assert torch.equal(biases(trainer.model), moved_LE)
    assert any("max_violation_batch" in log for log in trainer.state.log_history)
