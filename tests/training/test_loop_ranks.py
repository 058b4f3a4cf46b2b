"""Whole runs on two ranks, in process: resume to the bit, stop by signal, padding, evaluation, skipped steps."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.train_runs import config_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alfb_dist.config import ConfigError
from alfb_dist.distributed.launch.signals import DONE, PREEMPTED
from alfb_dist.training import loop as loop
from alfb_dist.training import run as runs
from alfb_dist.training.run import start


def run(folder: str, settings: Sequence[str], signal_at: int | None = None) -> int:
    """Train, with SIGTERM to rank 1 during the given step."""
    if signal_at is not None and dist.get_rank() == 1:
        inner, calls = loop.forward_backward_step, []

        def step(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(*arguments)

        loop.forward_backward_step = step
    return loop.train(config_of(Path(folder), *settings))


def lines(folder: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("step_seconds", "tokens_per_second")} for line in read]


@pytest.mark.parametrize("settings", [(), ("deepspeed.zero_optimization.stage=1", "model.dtype='bfloat16'")])
def test_a_run_stopped_by_a_signal_to_one_rank_resumes_to_the_bit(
    ranks: Any, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert ranks(2, run, str(straight), settings) == [DONE, DONE]
    assert ranks(2, run, str(stopped), settings, 4) == [PREEMPTED, PREEMPTED]
    half = lines(stopped / "runs" / "test")
    assert [line["step"] for line in half] == [1, 2, 3, 4]
    assert (stopped / "runs" / "test" / "checkpoints" / "step-00000004" / "manifest.json").is_file()
    assert ranks(2, run, str(stopped), (*settings, "run.resume=true")) == [DONE, DONE]
    assert [f.name for f in (stopped / "runs").iterdir()] == ["test"]
    assert lines(stopped / "runs" / "test") == lines(straight / "runs" / "test")


class Shapes(TorchDispatchMode):
    """A context that records the shapes of all tensors with memory that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not made.is_meta:
            self.seen.add(tuple(made.shape))
        return made


def shapes_of_build(folder: str, settings: Sequence[str]) -> tuple[set[tuple[int, ...]], dict[str, Tensor]]:
    """Return the shapes made while a run's model is built, and the model's tensors when the run starts."""
    inner, shapes = runs.build_model, Shapes()

    def build(*arguments: Any, **more: Any) -> Any:
        with shapes:
            return inner(*arguments, **more)

    runs.build_model = build
    model = start(config_of(Path(folder), *settings)).engine.module
    return shapes.seen, {name: x.detach().clone() for name, x in model.state_dict().items()}


def whole_shapes(tensors: dict[str, Tensor]) -> set[tuple[int, ...]]:
    """Return the shapes of expert tensors before they are sharded over two ranks."""
    return {(2 * x.shape[0], *x.shape[1:]) for name, x in tensors.items() if ".experts." in name}


def test_rank_of_a_resumed_run_never_has_more_than_its_share(ranks: Any, tmp_path: Path) -> None:
    two = ("parallel.ep_degree=2", "train.steps=2")
    for seen, tensors in ranks(2, shapes_of_build, str(tmp_path), two):
        assert whole_shapes(tensors) <= seen and len(whole_shapes(tensors)) == 2
    fresh = ranks(2, run, str(tmp_path), ("run.name='trained'", *two))
    assert fresh == [DONE, DONE]
    resumed = ranks(2, shapes_of_build, str(tmp_path), ("run.name='trained'", "run.resume=true", *two))
    save = tmp_path / "runs" / "trained" / "checkpoints" / "step-00000002"
    stored = {name: x for path in save.glob("tensors*.safetensors") for name, x in load_file(path).items()}
    for rank, (seen, tensors) in enumerate(resumed):
        assert not whole_shapes(tensors) & seen
        for name, x in tensors.items():
            if ".experts." in name:
                for e, row in enumerate(x, rank * len(x)):
                    assert row.any() and torch.equal(row, stored[f"weight/{name}/{e}"])


def test_resuming_a_finished_run_is_done_at_once(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, run, str(tmp_path), ("train.steps=2",)) == [DONE, DONE]
    before = lines(tmp_path / "runs" / "test")
    assert ranks(2, run, str(tmp_path), ("train.steps=2", "run.resume=true")) == [DONE, DONE]
    assert lines(tmp_path / "runs" / "test") == before


def resumed_over(folder: str, settings: Sequence[str]) -> tuple[list[str], int]:
    run_ = start(config_of(Path(folder), *settings, "run.resume=true"))
    return run_.messages, run_.first_step


def test_a_damaged_checkpoint_is_skipped_and_named_and_so_are_changed_settings(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, run, str(tmp_path), ("train.steps=4", "train.checkpoint_interval=2")) == [DONE, DONE]
    saves = tmp_path / "runs" / "test" / "checkpoints"
    damage(saves / "step-00000004")
    for messages, first_step in ranks(2, resumed_over, str(tmp_path), ("train.steps=4", "optimizer.lr=0.5")):
        assert first_step == 2
        assert "skipped a damaged checkpoint" in messages[0]
        assert "step-00000004" in messages[0]
        assert messages[1] == "resumed from step-00000002"
        assert "changed since the last start: optimizer.lr was 0.003, is 0.5" in messages


def damage(save: Path) -> None:
    file = next(save.glob("tensors-*"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def refused_resume(folder: str) -> str:
    with pytest.raises(ConfigError) as error:
        start(config_of(Path(folder), "run.resume=true"))
    return str(error.value)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, run, str(tmp_path), ("train.steps=2",)) == [DONE, DONE]
    damage(tmp_path / "runs" / "test" / "checkpoints" / "step-00000002")
    for message in ranks(2, refused_resume, str(tmp_path)):
        assert "no checkpoint of" in message
        assert "step-00000002" in message


def one_rank_cannot_read(folder: str) -> str:
    run_ = start(config_of(Path(folder)))
    if dist.get_rank() == 1:
        run_.train_batches.step = raise_damage  # type: ignore[method-assign]
    with pytest.raises(RuntimeError) as error:
        loop.next_batch(run_, 3)
    return str(error.value)


def raise_damage(*_: Any) -> Any:
    raise ValueError("train.tokens: damaged at byte 64")


def test_samples_that_one_rank_cannot_read_end_the_step_on_all(ranks: Any, tmp_path: Path) -> None:
    other, own = ranks(2, one_rank_cannot_read, str(tmp_path))
    assert "step 3: 1 rank(s) could not read their samples" in other
    assert "damaged at byte 64" in own


def test_resume_without_a_run_starts_one(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, run, str(tmp_path), ("run.resume=true", "train.steps=2")) == [DONE, DONE]
    assert [line["step"] for line in lines(tmp_path / "runs" / "test")] == [1, 2, 2]


def padded_loss(folder: str, source: str) -> dict[str, float]:
    """Return a step's reported loss, and the mean over all targets of the global batch, computed one by one."""
    run_ = start(config_of(Path(folder), "data.layout='padded'", "train.micro_batch=1", source))
    total, targets = 0.0, 0
    for rank in range(2):
        for batch in run_.train_batches.step(0, 8, rank, 2, 1):
            with torch.no_grad():
                logits = run_.engine.module(**{k: v for k, v in batch.items() if k != "labels"}).logits.double()
            for row, labels in zip(logits, batch["labels"]):
                for position, label in enumerate(labels[1:].tolist()):
                    if label >= 0:
                        total -= row[position].log_softmax(-1)[label].item()
                        targets += 1
    batch = loop.next_batch(run_, 1)
    part = loop.forward_backward_step(run_, batch)
    run_.balancer.step()
    loss, _ = loop.agree(run_, part, False)
    mask = [b["attention_mask"].sum() for r in range(2) for b in run_.train_batches.step(0, 8, r, 2, 1)]
    return {
        "reported": loss,
        "expected": total / targets,
        "counted": run_.balancer.load_LE.sum(-1).tolist(),
        "tokens": int(sum(mask)),
    }


def test_padded_loss_is_the_mean_over_targets_of_all_ranks_and_padding_counts_nowhere(
    ranks: Any, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text("abc " * (1 + i % 7))
    source = f"data.source=['{text}']"
    for found in ranks(2, padded_loss, str(tmp_path), source):
        assert found["reported"] == pytest.approx(found["expected"], rel=1e-5)
        assert found["counted"] == [found["tokens"] * 2] * 2  # top 2
        assert found["tokens"] < 8 * 32


def evaluated(folder: str) -> dict[str, Any]:
    """Return the validation record and loads at two micro-batch sizes. Asserts that no training load is counted."""
    found = {}
    for micro_batch in (1, 4):
        settings = (f"train.micro_batch={micro_batch}", "train.eval_sequences=7", f"run.name='m{micro_batch}'")
        run_ = start(config_of(Path(folder), *settings))
        records: list[Any] = []
        run_.reporter.evaluation = lambda record, load_LE, kept=records: kept.append((record, load_LE))
        loop.evaluate(run_, 1)
        found[micro_batch] = records[0]
        assert all(gate.pending_load_E is None for gate in run_.balancer.gates)
        assert run_.engine.module.training
    return found


def test_evaluation_counts_each_sequence_once_at_any_micro_batch(ranks: Any, tmp_path: Path) -> None:
    one, four = (ranks(2, evaluated, str(tmp_path))[0][m] for m in (1, 4))
    assert one[0]["val_loss"] == pytest.approx(four[0]["val_loss"], rel=1e-6)
    assert one[0]["val_perplexity"] == pytest.approx(math.exp(one[0]["val_loss"]))
    assert torch.equal(one[1], four[1])
    assert one[1].sum(-1).tolist() == [7 * 32 * 2] * 2  # 7 sequences of 32 tokens, top 2


def always_skipped(folder: str) -> str:
    inner = loop.start

    def poisoned(config: Any) -> Any:
        run_ = inner(config)
        run_.engine.module.lm_head.weight.register_hook(lambda grad: grad * math.nan)
        return run_

    loop.start = poisoned
    with pytest.raises(RuntimeError) as error:
        loop.train(config_of(Path(folder), "train.max_skipped_steps=3"))
    return str(error.value)


def test_a_run_that_only_skips_ends_with_the_reason(ranks: Any, tmp_path: Path) -> None:
    for message in ranks(2, always_skipped, str(tmp_path)):
        assert "3 steps in a row were skipped" in message


def test_an_action_at_an_interval_is_also_due_at_the_end() -> None:
    assert [step for step in range(1, 8) if loop.due(step, 3, step == 7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if loop.due(step, 0, step == 7)] == [7]
