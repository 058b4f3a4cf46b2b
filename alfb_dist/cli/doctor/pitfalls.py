"""Settings that are valid but seldom meant. Invalid ones are refused when the configuration is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.result import Result, not_applicable, ok, problem, warning
from alfb_dist.config import Config

SIGMOID_STEP = 0.002
"""The tuned rate as a fraction of the mean score: 1e-3 for a sigmoid's 0.5 (arXiv:2408.15664)."""
LONG_RUN = 10_000  # steps
LONGEST_LOSS_SECONDS = 1800.0


def judge_rate(rule: str, rate: float, score: str | None, num_experts: int) -> Result:
    """Judge a step of the bias against the scores that it is added to: a softmax over E experts averages 1/E."""
    check = "config: balance.rate"
    if rate == 0:
        return warning(check, "0: the biases never move", "balance.rate = 0.001, unless this run is the baseline")
    if score != "softmax" or rule != "sign":
        scores = f"{score} scores" if score else "scores of the family's own rule"
        return ok(check, f"{rate:g} for {scores}")
    fitting = SIGMOID_STEP / num_experts
    found = f"{rate:g} for softmax scores over {num_experts} experts, which average {1 / num_experts:.2g}"
    if rate <= 10 * fitting:
        return ok(check, found)
    fix = f'balance.rate = {fitting:.1g}, the same fraction of the mean score; or balance.rule = "proportional"'
    return warning(check, f"{found}; 1e-3 is tuned for sigmoid scores, which average 0.5", fix)


def judge_annealing(rate: float, zero_at: int | None, steps: int) -> Result:
    """Judge whether the rate ends at 0, as in arXiv:2412.19437 for the last 500B of 14.8T tokens."""
    check = "config: balance.zero_at_step"
    if rate == 0:
        return not_applicable(check, "the rate is 0")
    if zero_at is not None and zero_at >= steps:
        found = f"{zero_at} is not reached in {steps} steps"
        return warning(check, found, f"balance.zero_at_step = {steps - steps // 20}, or leave it out")
    if zero_at is None and steps >= LONG_RUN:
        fix = f"balance.zero_at_step = {steps - steps // 20}, so that the model is trained with its final biases"
        return warning(check, f"the rate stays {rate:g} until the last of {steps} steps", fix)
    return ok(check, "short run" if zero_at is None else f"rate 0 from step {zero_at} of {steps}")


def judge_mode(path: str, mode: str | tuple[str, ...], rate: float) -> Result:
    """Judge whether the mode of the biases was chosen. mode: one for all layers, or one for each."""
    check, modes = "config: balance.mode", {mode} if isinstance(mode, str) else set(mode)
    named = mode if isinstance(mode, str) else "by layer: " + ", ".join(mode)
    if path and mode == "auto":
        fix = 'balance.mode = "train" or "recentre" to keep balancing, "freeze" to keep them'
        return warning(check, "auto, with a released model: its biases stay as released", fix)
    if modes == {"freeze"} and not path:
        return warning(check, f"{named}, with a new model: its biases stay 0", 'balance.mode = "train"')
    if path and modes & {"train", "recentre"} and rate > 0:
        return ok(check, f"{named}: the biases of {path} move")
    return ok(check, named)


def judge_losses(rate: float, sequence_alpha: float, batch_alpha: float) -> Result:
    """Judge whether a loss balances the load as well as the bias."""
    check = "config: auxiliary losses"
    if batch_alpha > 0 and rate > 0:
        found = f"balance.batch_loss_alpha ({batch_alpha:g}) and balance.rate ({rate:g}) both balance the load"
        return warning(check, found, "keep one of them: balance.batch_loss_alpha = 0, or balance.rate = 0 to compare")
    if sequence_alpha > 0.001:
        found = f"balance.sequence_loss_alpha ({sequence_alpha:g}) is large: DeepSeek-V3 uses 0.0001"
        return warning(check, found, "balance.sequence_loss_alpha = 0.0001")
    if batch_alpha > 0:
        return ok(check, f"batch_loss_alpha {batch_alpha:g} instead of the bias")
    return ok(check, f"sequence_loss_alpha {sequence_alpha:g}" if sequence_alpha else "none")


def judge_accumulation(managed: bool, stage: int, micro_batches: int) -> Result:
    """Judge whether DeepSpeed accumulates gradients as the training loop expects."""
    check = "config: accumulation"
    if not managed:
        found = "deepspeed.managed_gradient_accumulation = false: every micro-batch would be an optimizer step"
        return problem(check, found, "remove it: accumulation follows from train.global_batch and train.micro_batch")
    if stage == 2 and micro_batches > 1:
        found = f"ZeRO-2 averages gradients after each of {micro_batches} micro-batches, stage 1 once"
        fix = "zero_optimization.stage = 1 if memory allows; in a script of your own, no engine.no_sync() with stage 2"
        return warning(check, found, fix)
    return ok(check, f"{micro_batches} micro-batches per step, ZeRO-{stage}")


def judge_layout(layout: str) -> Result:
    """Report how padding is treated."""
    if layout == "padded":
        return ok("config: padding", "padded, with attention masks: padding is neither counted nor trained on")
    return ok("config: padding", "none: sequences are packed")


def judge_checkpoints(interval: int, steps: int, step_seconds: float | None) -> Result:
    """Judge what a crash would cost. step_seconds: of an earlier run, None without one."""
    check, lost = "config: train.checkpoint_interval", interval if 0 < interval < steps else steps
    fix = "a smaller train.checkpoint_interval, the number of steps that a crash can cost"
    if step_seconds is None:
        if lost == steps and steps > 100:
            return warning(check, f"the only checkpoint follows step {steps}: a crash costs the whole run", fix)
        return ok(check, f"a crash costs at most {lost} steps")
    seconds = lost * step_seconds
    found = f"a crash costs up to {seconds / 60:.0f} min: {lost} steps of {step_seconds:.2g} s, as in the last run"
    return warning(check, found, fix) if seconds > LONGEST_LOSS_SECONDS else ok(check, found)


def judge_groups(ep_degree: int, hosts: dict[str, int]) -> Result:
    """Judge whether the all-to-all of an expert-parallel group stays within a host."""
    check = "config: parallel.ep_degree"
    if len(hosts) < 2:
        return not_applicable(check, "one host")
    if any(slots % ep_degree for slots in hosts.values()):
        found = f"groups of {ep_degree} ranks span hosts of {', '.join(map(str, sorted(set(hosts.values()))))} ranks"
        return warning(
            check, found, "a parallel.ep_degree that divides the ranks of each host, if the experts fit there"
        )
    return ok(check, f"groups of {ep_degree} ranks stay within their hosts")


def judge_bias_types(types: dict[str, str]) -> Result:
    """Judge how a released model stores its biases. types: dtype by name of the bias."""
    check = "config: released biases"
    narrow = [name for name, dtype in types.items() if dtype != "float32"]
    if not types:
        return not_applicable(check, "no released model with biases")
    if narrow:
        found = f"{len(narrow)} of {len(types)} are stored as {types[narrow[0]]}: they were rounded"
        fix = 'use a release with float32 biases, or balance.mode = "train" to balance them again'
        return warning(check, found, fix)
    return ok(check, f"{len(types)}, in float32")


def judge_source(source: str, exists: bool) -> Result | None:
    """Judge a data source; None if it exists."""
    if exists:
        return None
    return problem("config: data.source", f"{source} does not exist", 'give a file, a directory or "python-stdlib"')


def gate_score(config: Config) -> tuple[str | None, int]:
    """Return the score function of the model's gates, None if it is not known, and the number of experts."""
    from alfb_dist.moe.families.blocks import moe_blocks, num_choices
    from alfb_dist.moe.families.probe import probe_router
    from alfb_dist.training.model import meta_model

    block = next(moe_blocks(meta_model(config)))
    spec = probe_router(block.gate, block.bias_name, block.holder).spec
    bias = getattr(block.holder, block.bias_name, None)
    return None if spec is None else spec.score, num_choices(block.gate, bias)


def last_step_seconds(config: Config) -> float | None:
    """Return the median of the last steps of the last run of this name, or None without one."""
    from alfb_dist.report.metrics_file import read_metrics
    from alfb_dist.training.run_folder import last_run_folder

    directory = last_run_folder(Path(config.run.folder), config.run.name)
    records = [] if directory is None else read_metrics(directory / "metrics.jsonl")
    seconds = [r["step_seconds"] for r in records if isinstance(r.get("step_seconds"), float)]
    return median(seconds[-100:]) if seconds else None


def bias_types(path: str) -> dict[str, str]:
    """Return the dtype of each bias of a released model, by name. Only file headers are read."""
    from alfb_dist.checkpoint.safetensors_reader import SafetensorsReader
    from alfb_dist.pretrained.names import is_bias

    stored = SafetensorsReader(sorted(Path(path).glob("*.safetensors"))).tensors if path else {}
    return {name: str(t.dtype).removeprefix("torch.") for name, t in stored.items() if is_bias(name)}


def check_configuration(case: Case) -> Iterator[Result]:
    """Report the problems of the configuration, or its pitfalls."""
    from alfb_dist.data.sources import PYTHON_STDLIB

    for line in case.config_problems:
        yield problem("config", line, "change the key that the message names")
    config, sizes = case.config, case.estimate
    if config is None or sizes is None:
        if not case.config_problems:
            yield not_applicable("config", "none given (alfb doctor CONFIG)")
        return
    balance, train, deepspeed = config.balance, config.train, config.deepspeed
    zero = deepspeed.get("zero_optimization")
    stage = int(zero.get("stage", 0)) if isinstance(zero, dict) else 0  # type: ignore[arg-type]
    yield judge_rate(balance.rule, balance.rate, *gate_score(config))
    yield judge_annealing(balance.rate, balance.zero_at_step, train.steps)
    yield judge_mode(config.model.path, balance.mode, balance.rate)
    yield judge_losses(balance.rate, balance.sequence_loss_alpha, balance.batch_loss_alpha)
    managed = deepspeed.get("managed_gradient_accumulation") is not False
    yield judge_accumulation(managed, stage, sizes.accumulation_steps)
    yield judge_layout(config.data.layout)
    yield judge_checkpoints(train.checkpoint_interval, train.steps, last_step_seconds(config))
    yield judge_groups(config.parallel.ep_degree, dict(case.hosts))
    yield judge_bias_types(bias_types(config.model.path))
    for source in (*config.data.source, *config.data.validation_source):
        if result := judge_source(source, source == PYTHON_STDLIB or Path(source).exists()):
            yield result
