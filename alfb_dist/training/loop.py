"""The training loop: the order of events in a run."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alfb_dist import checkpoint
from alfb_dist.balance import metrics
from alfb_dist.config import Config
from alfb_dist.distributed.collectives import all_sum
from alfb_dist.distributed.launch.signals import DONE, PREEMPTED, StopSignals
from alfb_dist.moe.gate import measure_loads
from alfb_dist.profiling import span
from alfb_dist.training.profiler import NoRecorder, Recorder, open_recorder
from alfb_dist.training.run import Run, start


def train(
    config: Config,
    stop: StopSignals | None = None,
    on_start: Callable[[Run], None] | None = None,
    *,
    profile: bool = False,
) -> int:
    """Train until the last step, or stop early with a checkpoint; return the exit code. Collective over all ranks.

    stop: what asks the run to stop; signals by default. on_start: called before the first step.
    profile: the first and the last rank write a trace of a few steps to the run directory.
    """
    run = start(config)
    if on_start is not None:
        on_start(run)
    last = stopping = False
    with (
        contextlib.nullcontext(stop) if stop else StopSignals() as signals,
        recorder_of(run, profile) as recorder,
        run.peers.watch(),
    ):
        for step in range(run.first_step + 1, config.train.steps + 1):
            run.peers.step, lr, begun = step, run.engine.get_lr()[0], time.perf_counter()
            with span("data"):
                batch = next_batch(run, step)
            part = forward_backward_step(run, batch)
            with span("bias"):
                load_LE = run.balancer.reduce_loads()
                run.balancer.update(load_LE)
            loss, stopping = agree(run, part, signals.requested)
            report(run, step, batch, loss, lr, time.perf_counter() - begun)
            last = step == config.train.steps
            if due(step, config.train.eval_interval, last):
                with span("evaluate"):
                    evaluate(run, step)
            if due(step, config.train.checkpoint_interval, last or stopping):
                with span("checkpoint"):
                    save(run, step)
            recorder.step()
            if stopping:
                break
    run.reporter.close(run.summary)
    return PREEMPTED if stopping and not last else DONE


def recorder_of(run: Run, profile: bool) -> Recorder | NoRecorder:
    """Return the recorder of this rank's steps; one that does nothing without `profile`."""
    if not profile:
        return NoRecorder()
    steps = run.config.train.steps - run.first_step
    return open_recorder(run.folder, run.group.rank(), run.group.size(), steps, run.engine.module, run.reporter.message)


@dataclass(frozen=True)
class StepBatch:
    """A rank's micro-batches of one optimizer step, and two counts over all ranks."""

    micro_batches: list[dict[str, Tensor]]
    targets: int  # tokens to predict
    tokens: int  # without padding


def due(step: int, interval: int, last: bool) -> bool:
    """Return whether an action is due after this step. interval: in steps; 0 is at the last step only."""
    return last or (interval > 0 and step % interval == 0)


def on_device(run: Run, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the micro-batch on the model's device."""
    return {name: x.to(run.device, non_blocking=True) for name, x in batch.items()}


def num_targets(batch: dict[str, Tensor]) -> Tensor:
    """Return the number of tokens to predict in the micro-batch."""
    return (batch["labels"][:, 1:] >= 0).sum()


def next_batch(run: Run, step: int) -> StepBatch:
    """Return the step's samples; collective. Raises RuntimeError on every rank if a rank cannot read its own."""
    rank, world, micro_batch = run.slot
    failure: Exception | None = None
    micro_batches: list[dict[str, Tensor]] = []
    try:
        micro_batches = run.train_batches.step(step - 1, run.config.train.global_batch, rank, world, micro_batch)
    except (OSError, ValueError) as error:
        failure = error
    targets = sum(int(num_targets(batch)) for batch in micro_batches)
    tokens = sum(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in micro_batches)
    counts = torch.tensor([targets, tokens, failure is not None], device=run.device)
    all_targets, all_tokens, failures = all_sum(counts, run.group).tolist()
    if failures:
        raise RuntimeError(
            f"step {step}: {failures} rank(s) could not read their samples: {failure or 'see the other ranks'}"
        ) from failure
    return StepBatch(micro_batches, all_targets, all_tokens)


def forward_backward_step(run: Run, batch: StepBatch) -> Tensor:
    """Take one optimizer step. Return this rank's part of the mean loss per predicted token.

    The parts of all ranks add up to the mean over the global batch, wherever its padding is.
    """
    parts = run.group.size() * len(batch.micro_batches)
    # The engine averages over ranks and micro-batches, so each divides its sum by the mean number of targets.
    mean_targets = torch.tensor(batch.targets / parts, device=run.device)
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    for micro_batch in batch.micro_batches:
        loss = run.engine(**on_device(run, micro_batch), num_items_in_batch=mean_targets).loss
        run.engine.backward(loss)
        with span("optimizer"):
            run.engine.step()
        total += loss.detach()
    return total / parts


def agree(run: Run, part: Tensor, asked_to_stop: bool) -> tuple[float, bool]:
    """Return the loss of the global batch, and whether any rank was asked to stop; collective.

    Raises RuntimeError after train.max_skipped_steps skipped steps in a row.
    """
    total, asked = all_sum(torch.stack([part, part.new_tensor(asked_to_stop)]), run.group).tolist()
    applied = run.engine.was_step_applied()
    run.skipped_in_a_row = 0 if applied else run.skipped_in_a_row + 1
    if run.skipped_in_a_row >= run.config.train.max_skipped_steps:
        raise RuntimeError(
            f"{run.skipped_in_a_row} steps in a row were skipped because their gradients were not finite "
            "(train.max_skipped_steps): resume from the last checkpoint with a lower optimizer.lr"
        )
    return total, asked > 0


def report(run: Run, step: int, batch: StepBatch, loss: float, lr: float, seconds: float) -> None:
    """Show the step in the progress bar and, at the log interval, write it to the metrics."""
    config, load_LE = run.config, run.balancer.load_LE
    run.tokens += batch.tokens
    violation_L = metrics.max_violation(load_LE)
    grad_norm = run.engine.get_global_grad_norm()
    record: dict[str, Any] = {
        "step": step,
        "tokens": run.tokens,
        "loss": loss,
        "lr": lr,
        "grad_norm": None if grad_norm is None else float(grad_norm),
        "step_seconds": seconds,
        "tokens_per_second": batch.tokens / seconds,
        "max_violation_batch": float(violation_L.mean()),
        "max_violation_batch_per_layer": violation_L.tolist(),
        "rank_skew": float(metrics.rank_skew(load_LE, config.parallel.ep_degree).mean()),
        "bias_range": metrics.bias_range(run.balancer.bias_LE),
        "dead_experts": metrics.dead_experts(load_LE),
        "skipped": run.engine.skipped_steps,
    }
    run.reporter.advance(record)
    if due(step, config.report.log_interval, step in (1, config.train.steps)):
        run.reporter.step(record, load_LE, run.balancer.bias_LE)


@torch.no_grad()
def evaluate(run: Run, step: int) -> None:
    """Report the loss and the balance over the validation sequences; collective."""
    rank, world, micro_batch = run.slot
    totals = torch.zeros(2, dtype=torch.float64, device=run.device)
    run.engine.eval()
    with measure_loads(run.balancer.gates) as measured:
        for batch in run.validation_batches.evaluation(run.config.train.eval_sequences, rank, world, micro_batch):
            loss_sum = run.engine(**on_device(run, batch), num_items_in_batch=1).loss
            totals += torch.stack([loss_sum.to(totals), num_targets(batch).to(totals)])
        load_LE = all_sum(measured(), run.group)
    run.engine.train()
    loss_sum_, targets = all_sum(totals, run.group).tolist()
    loss = loss_sum_ / targets
    record = {
        "step": step,
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700.0)),
        "max_violation_global": float(metrics.max_violation(load_LE).mean()),
    }
    run.reporter.evaluation(record, load_LE)


def save(run: Run, step: int) -> None:
    """Save a checkpoint of this step; if the disk fails, print a message and go on. Collective."""
    state = {
        "step": step,
        "tokens": run.tokens,
        "summary": run.summary,
        "config_hash": run.config.hash(),
        "seed": run.config.run.seed,
    }
    try:
        checkpoint.save(
            run.engine,
            run.balancer,
            run.folder / "checkpoints",
            step=step,
            state=state,
            keep=run.config.train.keep_checkpoints,
        )
    except OSError as error:  # the same on every rank
        run.reporter.message(f"no checkpoint at step {step}: {error}")
