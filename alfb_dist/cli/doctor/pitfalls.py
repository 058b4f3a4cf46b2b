"""What a configuration allows and seldom means. What it must not hold is refused when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.result import Result, not_applicable, ok, problem, warning
from alfb_dist.config import Config

SIGMOID_STEP = 0.002
"""The tuned rate as a part of the mean score: 1e-3 of a sigmoid's 0.5 (arXiv:2408.15664)."""
LONG_RUN = 10_000  # steps
LONGEST_LOSS_SECONDS = 1800.0


def judge_rate(rule: str, rate: float, score: str | None, num_experts: int) -> Result:
    """A step of the bias against the scores that it is added to: a softmax over E experts averages 1/E."""
    check = "config: balance.rate"
    if rate == 0:
        return warning(
            check, "0: the biases never move", "balance.rate = 0.001, unless this is the run to compare with"
        )
    if score != "softmax" or rule != "sign":
        scores = f"{score} scores" if score else "scores of a rule of the family's own"
        return ok(check, f"{rate:g} for {scores}")
    fitting = SIGMOID_STEP / num_experts
    found = f"{rate:g} for softmax scores over {num_experts} experts, which average {1 / num_experts:.2g}"
    if rate <= 10 * fitting:
        return ok(check, found)
    mend = (
        f'balance.rate = {fitting:.1g}, as far from the mean score as 1e-3 from a sigmoid\'s; or rule = "proportional"'
    )
    return warning(check, f"{found}; 1e-3 is tuned for sigmoid scores, which average 0.5", mend)


def judge_annealing(rate: float, zero_at: int | None, steps: int) -> Result:
    """Whether the rate ends at 0, as in published long runs: arXiv:2412.19437, the last 500B of 14.8T tokens."""
    check = "config: balance.zero_at_step"
    if rate == 0:
        return not_applicable(check, "the rate is 0")
    if zero_at is not None and zero_at >= steps:
        found = f"{zero_at} is not reached in {steps} steps"
        return warning(check, found, f"balance.zero_at_step = {steps - steps // 20}, or leave it out")
    if zero_at is None and steps >= LONG_RUN:
        mend = f"balance.zero_at_step = {steps - steps // 20}: the model ends with biases that it was trained with"
        return warning(check, f"the rate stays {rate:g} to the last of {steps} steps", mend)
    return ok(check, "short run" if zero_at is None else f"rate 0 from step {zero_at} of {steps}")


def judge_mode(path: str, mode: str | tuple[str, ...], rate: float) -> Result:
    """Whether what happens to a released model's biases was decided. mode: one for all layers, or one for each."""
    check, modes = "config: balance.mode", {mode} if isinstance(mode, str) else set(mode)
    told = mode if isinstance(mode, str) else "by layer: " + ", ".join(mode)
    if path and mode == "auto":
        mend = 'balance.mode = "train" or "recentre" to keep balancing, "freeze" if that is meant'
        return warning(check, "auto, with a released model: its biases stay as released", mend)
    if modes == {"freeze"} and not path:
        return warning(check, f"{told}, with a new model: its biases stay 0", 'balance.mode = "train"')
    if path and modes & {"train", "recentre"} and rate > 0:
        return ok(check, f"{told}: the biases of {path} move")
    return ok(check, told)


def judge_losses(rate: float, sequence_alpha: float, batch_alpha: float) -> Result:
    """Whether a loss pulls where the bias does."""
    check = "config: auxiliary losses"
    if batch_alpha > 0 and rate > 0:
        found = f"balance.batch_loss_alpha ({batch_alpha:g}) beside the bias, which does without"
        return warning(check, found, "keep one of them: batch_loss_alpha = 0, or rate = 0 to compare")
    if sequence_alpha > 0.001:
        found = f"balance.sequence_loss_alpha ({sequence_alpha:g}) is large: DeepSeek-V3 takes 0.0001"
        return warning(check, found, "balance.sequence_loss_alpha = 0.0001")
    if batch_alpha > 0:
        return ok(check, f"batch_loss_alpha {batch_alpha:g} instead of the bias")
    return ok(check, f"sequence_loss_alpha {sequence_alpha:g}" if sequence_alpha else "none")


def judge_accumulation(managed: bool, stage: int, micro_batches: int) -> Result:
    """Whether DeepSpeed accumulates as the training loop expects."""
    check = "config: accumulation"
    if not managed:
        found = "deepspeed.managed_gradient_accumulation = false: every micro-batch would be an optimizer step"
        return problem(check, found, "remove it: train.global_batch and train.micro_batch decide")
    if stage == 2 and micro_batches > 1:
        found = f"ZeRO-2 averages gradients after each of {micro_batches} micro-batches, stage 1 once"
        mend = "zero_optimization.stage = 1 if memory allows; in a script of your own, no engine.no_sync() with stage 2"
        return warning(check, found, mend)
    return ok(check, f"{micro_batches} micro-batches a step, ZeRO-{stage}")


def judge_layout(layout: str) -> Result:
    """Whether padding is told from tokens."""
    if layout == "padded":
        return ok("config: padding", "padded, with attention masks: padding is neither counted nor trained on")
    return ok("config: padding", "none: sequences are packed")


def judge_checkpoints(interval: int, steps: int, step_seconds: float | None) -> Result:
    """What a crash would cost. step_seconds: of an earlier run, None without one."""
    check, lost = "config: train.checkpoint_interval", interval if 0 < interval < steps else steps
    mend = "a smaller train.checkpoint_interval: at most so many steps are lost"
    if step_seconds is None:
        if lost == steps and steps > 100:
            return warning(check, f"only the end of {steps} steps is saved: a crash costs the whole run", mend)
        return ok(check, f"a crash costs at most {lost} steps")
    found = (
        f"a crash costs up to {lost * step_seconds / 60:.0f} min: {lost} steps of {step_seconds:.2g} s, as last seen"
    )
    return warning(check, found, mend) if lost * step_seconds > LONGEST_LOSS_SECONDS else ok(check, found)


def judge_groups(ep_degree: int, hosts: dict[str, int]) -> Result:
    """Whether the all-to-all of an expert-parallel group stays within a host."""
    check = "config: parallel.ep_degree"
    if len(hosts) < 2:
        return not_applicable(check, "one host")
    if any(slots % ep_degree for slots in hosts.values()):
        found = f"groups of {ep_degree} ranks reach over hosts of {', '.join(map(str, sorted(set(hosts.values()))))}"
        return warning(check, found, "parallel.ep_degree that divides the slots of each host, if the experts fit there")
    return ok(check, f"groups of {ep_degree} ranks stay within their hosts")


def judge_bias_types(types: dict[str, str]) -> Result:
    """types: by name of a released bias, the type that it is stored in."""
    check = "config: released biases"
    narrow = [name for name, dtype in types.items() if dtype != "float32"]
    if not types:
        return not_applicable(check, "no released model with biases")
    if narrow:
        found = f"{len(narrow)} of {len(types)} are stored as {types[narrow[0]]}: rounded before they came here"
        mend = 'use a release with float32 biases, or balance.mode = "train" to let them settle again'
        return warning(check, found, mend)
    return ok(check, f"{len(types)}, in float32")


def judge_source(source: str, exists: bool) -> Result | None:
    """A data source that is not there; None where all is well."""
    if exists:
        return None
    return problem("config: data.source", f"{source} does not exist", 'give a file, a folder or "python-stdlib"')


def gate_score(config: Config) -> tuple[str | None, int]:
    """Which scores the model's gates give, None for others than a sigmoid's or softmax's, and over how many experts."""
    from alfb_dist.moe.families.blocks import moe_blocks, num_choices
    from alfb_dist.moe.families.probe import find_spec
    from alfb_dist.training.model import meta_model

    block = next(moe_blocks(meta_model(config)))
    spec = find_spec(block.gate, block.bias_name, block.holder)
    bias = getattr(block.holder, block.bias_name, None)
    return None if spec is None else spec.score, num_choices(block.gate, bias)


def last_step_seconds(config: Config) -> float | None:
    """The median of the last steps of the run of this name, or None if there is none."""
    from alfb_dist.report.metrics_file import read_metrics
    from alfb_dist.training.run_folder import last_run_folder

    folder = last_run_folder(Path(config.run.folder), config.run.name)
    records = [] if folder is None else read_metrics(folder / "metrics.jsonl")
    seconds = [r["step_seconds"] for r in records if isinstance(r.get("step_seconds"), float)]
    return median(seconds[-100:]) if seconds else None


def bias_types(path: str) -> dict[str, str]:
    """The type of each bias of a released model, by name; only headers are read."""
    from alfb_dist.checkpoint.safetensors_reader import SafetensorsReader
    from alfb_dist.pretrained.names import is_bias

    stored = SafetensorsReader(sorted(Path(path).glob("*.safetensors"))).tensors if path else {}
    return {name: str(t.dtype).removeprefix("torch.") for name, t in stored.items() if is_bias(name)}


def check_configuration(case: Case) -> Iterator[Result]:
    """What is wrong with the configuration, or its pitfalls."""
    from alfb_dist.data.sources import PYTHON_STDLIB

    for line in case.refused:
        yield problem("config", line, "change the key that the message names")
    config, sizes = case.config, case.estimate
    if config is None or sizes is None:
        if not case.refused:
            yield not_applicable("config", "none given: alfb doctor CONFIG")
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
