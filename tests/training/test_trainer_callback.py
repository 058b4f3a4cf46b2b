"""BalanceCallback in real runs of transformers' Trainer: in one process, resumed, logged, skipped, checkpointed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import biases, plain_step, random_biases, set_biases, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import alfb_dist
from alfb_dist.training.trainer_callback import BalanceCallback

STEPS, RATE, LEARNING_RATE, MICRO_BATCHES, TOP_K = 4, 0.05, 0.1, 2, 4
SEQUENCES, POSITIONS, PER_STEP = 16, 6, 4

# accelerate's, of the CPU: pinned memory without a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def batch(padded: bool = True) -> dict[str, Tensor]:
    """Return all sequences in order; every second one ends in padding."""
    return tiny_batch(7, SEQUENCES, POSITIONS, padding=[0, 2] * (SEQUENCES // 2) if padded else None)


def rows(padded: bool = True) -> list[dict[str, Tensor]]:
    return [{name: x[i] for name, x in batch(padded).items()} for i in range(SEQUENCES)]


def start_model() -> nn.Module:
    model = tiny_model(3)
    set_biases(model, random_biases(model, 4))
    return model


class InOrderTrainer(Trainer):
    """Takes the sequences in their order, as the plain loop does."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "per_device_train_batch_size": PER_STEP // MICRO_BATCHES,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "max_steps": STEPS,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**given, **overrides})


def trainer(folder: Path, *callbacks: Any, model: nn.Module | None = None, **overrides: Any) -> Trainer:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = start_model() if model is None else model
    data = rows()
    given = arguments(folder, **overrides)
    return InOrderTrainer(model, given, train_dataset=data, eval_dataset=data[:3], callbacks=list(callbacks))


def plain_loop(steps: int = STEPS, rate: float = RATE) -> list[dict[str, Tensor]]:
    """Return the steps of the same training by hand, with the mean loss per predicted token of a step."""
    model, cut = start_model(), [slice(PER_STEP * step, PER_STEP * (step + 1)) for step in range(steps)]
    parts = [{name: x[one] for name, x in batch().items()} for one in cut]
    return [plain_step(model, now, learning_rate=LEARNING_RATE, rate=rate) for now in parts]


class Watching(TrainerCallback):
    """Records what wandb's callback would see, and the biases after each step. Added before BalanceCallback."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []
        self.biases: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.biases.append(biases(model))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    {"eval_strategy": "no", "per_device_train_batch_size": PER_STEP, "gradient_accumulation_steps": 1},
    {"eval_on_start": True, "remove_unused_columns": False},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda v: "-".join(v) or "accumulation and evaluation")
def test_bias_and_load_equal_a_plain_loops(tmp_path: Path, overrides: dict[str, Any]) -> None:
    callback, watching = BalanceCallback(rate=RATE), Watching()
    trainer(tmp_path, watching, callback, **overrides).train()
    for bias_LE, seen in zip(watching.biases, plain_loop(), strict=True):
        assert torch.equal(bias_LE.view(torch.int32), seen["bias"].view(torch.int32))
    assert callback.balancer is not None and torch.equal(callback.balancer.load_LE, plain_loop()[-1]["load"])
    assert callback.balancer.load_LE.sum(1).tolist() == [int(batch()["attention_mask"][-PER_STEP:].sum()) * TOP_K] * 2


def test_reporting_callbacks_and_history_see_the_balance(tmp_path: Path) -> None:
    watching = Watching()
    run = trainer(tmp_path, watching, BalanceCallback(rate=RATE))
    run.train()
    expected = [float(alfb_dist.max_violation(seen["load"]).mean()) for seen in plain_loop()]
    for logs in (watching.logs, run.state.log_history):
        balanced = [log for log in logs if "max_violation_batch" in log]
        assert [log["max_violation_batch"] for log in balanced] == expected
        assert all("loss" in log and {"bias_range", "dead_experts"} <= set(log) for log in balanced)
    names = [type(c).__name__ for c in run.callback_handler.callbacks]
    assert names[:2] == ["DefaultFlowCallback", "BalanceCallback"] and len(set(names)) == len(names)


@pytest.mark.parametrize("restore", [False, True], ids=["callback as given", "callback from the checkpoint"])
def test_resumed_training_goes_on_as_if_nothing_had_been(tmp_path: Path, restore: bool) -> None:
    given: dict[str, Any] = {"rate": 0.3, "mode": "recentre", "warmup_steps": 3, "zero_at_step": 4, "rule": "rms"}
    straight = Watching()
    whole = trainer(tmp_path / "straight", straight, BalanceCallback(**given))
    whole.train()
    trainer(tmp_path / "first", BalanceCallback(**given), save_strategy="steps", save_steps=2).train()
    path, resumed = tmp_path / "first" / "checkpoint-2", Watching()
    model = tiny_model(9)  # with other weights: all come from the checkpoint, where experts stand one by one
    set_biases(model, torch.full((2, 8), 9.0))
    run = trainer(
        tmp_path / "second",
        resumed,
        BalanceCallback(**given),
        model=model,
        restore_callback_states_from_checkpoint=restore,
    )
    run.train(resume_from_checkpoint=str(path))
    for name, w in run.model.named_parameters():
        assert torch.equal(w, dict(whole.model.named_parameters())[name]), name
    for bias_LE, expected in zip(resumed.biases, straight.biases[2:], strict=True):
        assert torch.equal(bias_LE.view(torch.int32), expected.view(torch.int32))
    saved = json.loads((path / "trainer_state.json").read_text())["stateful_callbacks"]["BalanceCallback"]
    assert saved["args"] == {**given, "centered": False} and saved["attributes"]["saved"]["num_steps"] == 2


def test_second_training_restarts_the_schedule(tmp_path: Path) -> None:
    callback = BalanceCallback(rate=RATE)
    run = trainer(tmp_path, callback, max_steps=2)
    for _ in range(2):
        run.train()
        assert callback.balancer is not None and callback.balancer.num_steps == 2


def test_skipped_optimizer_step_drops_its_loads(tmp_path: Path) -> None:
    """accelerate's optimizer has step_was_skipped set after a gradient overflow under AMP, DeepSpeed's too."""
    callback, watching, seen = BalanceCallback(rate=RATE), Watching(), []

    class Skips(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, optimizer: Any = None, **__: Any) -> None:
            skipped = state.global_step == 1
            seen.append(optimizer.step_was_skipped)
            type(optimizer).step_was_skipped = property(lambda _: skipped)

    from accelerate.optimizer import AcceleratedOptimizer

    kept = AcceleratedOptimizer.step_was_skipped
    try:
        trainer(tmp_path, Skips(), watching, callback).train()
    finally:
        AcceleratedOptimizer.step_was_skipped = kept
    assert callback.balancer is not None and callback.balancer.num_steps == STEPS - 1
    assert torch.equal(watching.biases[0], watching.biases[1])
    assert not torch.equal(watching.biases[1], watching.biases[2])


def test_frozen_biases_are_counted_and_logged(tmp_path: Path) -> None:
    watching, model = Watching(), start_model()
    before = biases(model)
    trainer(tmp_path, watching, BalanceCallback(mode="freeze"), model=model).train()
    assert torch.equal(biases(model), before)
    assert all(log["max_violation_batch"] > 0 for log in watching.logs if "loss" in log)


def test_exported_model_has_the_trained_bias_in_float32(tmp_path: Path) -> None:
    run = trainer(tmp_path, BalanceCallback(rate=RATE), bf16=True, max_steps=2)
    run.train()
    run.save_model(str(tmp_path / "out"))
    again = type(run.model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert biases(again).dtype == torch.float32 and torch.equal(biases(again), biases(run.model))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"rule": "sing"}, "got 'sing'"),
        ({"rate": -1.0}, "got -1.0"),
        ({"mode": "off"}, "got 'off'"),
        ({"warmup_steps": 2, "zero_at_step": 2}, "zero_at_step"),
        ({"rate": lambda step: 0.5}, "rate must be a number"),
    ],
)
def test_argument_that_is_not_valid_is_refused_at_once(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BalanceCallback(**given)


def test_copies_of_the_model_in_one_process_are_refused(tmp_path: Path) -> None:
    """Trainer uses torch.nn.DataParallel for several GPUs in one process."""
    given = arguments(tmp_path)
    given._n_gpu = 2
    with pytest.raises(ValueError, match="one process with 2 GPUs"):
        BalanceCallback().on_train_begin(given, None, None, model=start_model())


def test_model_without_a_bias_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no MoE block"):
        trainer(tmp_path, BalanceCallback(), model=tiny_model(first_k_dense_replace=3)).train()
