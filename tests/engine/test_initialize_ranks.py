"""The DeepSpeed engine around sharded experts against a plain torch loop in one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.tiny import full_weights, part, random_biases, set_biases, tiny_batch, tiny_model
from torch import Tensor

import alfb_dist
from alfb_dist.engine.initialize import quiet
from alfb_dist.engine.patches import global_grad_norm

STEPS, SEQUENCES, POSITIONS, LR, CLIP, RATE = 3, 8, 12, 1e-2, 0.5, 0.01


def ds_config(stage: int, micro_batches: int, *, bf16: bool = False, clip: float = CLIP) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": SEQUENCES // (micro_batches * dist.get_world_size()),
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": clip,
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage},
    }


def started(
    stage: int, ep_degree: int, micro_batches: int = 2, *, recompute: bool | None = None, **options: Any
) -> Any:
    quiet()
    model = tiny_model()
    set_biases(model, random_biases(model, 1))
    if recompute is not None:
        model.activation_checkpointing_enable({"use_reentrant": recompute})
    config = ds_config(stage, micro_batches, **options)
    return alfb_dist.initialize(model, config, ep_degree=ep_degree, rate=RATE)


def one_step(engine: Any, balancer: Any, step: int, micro_batches: int = 2) -> None:
    """Train on the rank's share of the step's batch, in micro-batches, as a user's script does."""
    batch, rank, world = tiny_batch(step, SEQUENCES, POSITIONS), dist.get_rank(), dist.get_world_size()
    for i in range(micro_batches):
        loss = engine(**part(batch, i * world + rank, micro_batches * world)).loss
        engine.backward(loss)
        engine.step()
        balancer.step()


def trained(stage: int, ep_degree: int, micro_batches: int = 2, **options: Any) -> dict[str, Any]:
    engine, balancer = started(stage, ep_degree, micro_batches, **options)
    norms = []
    for step in range(STEPS):
        one_step(engine, balancer, step, micro_batches)
        norms.append(float(engine.get_global_grad_norm()))
    return {
        "weights": full_weights(engine.module),
        "bias": balancer.bias_LE,
        "load": balancer.load_LE,
        "norms": norms,
        "updates": balancer.num_steps,
    }


def plain() -> dict[str, Any]:
    """Return the result of the same training without DeepSpeed, ranks or micro-batches."""
    model = tiny_model()
    set_biases(model, random_biases(model, 1))
    alfb_dist.parallelize(model, ep_degree=1)
    balancer = alfb_dist.Balancer(model, rate=RATE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**tiny_batch(step, SEQUENCES, POSITIONS)).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        balancer.step()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"weights": weights, "bias": balancer.bias_LE, "load": balancer.load_LE, "norms": norms}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return plain()


def assert_same_training(result: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(result["norms"], expected["norms"], rtol=1e-5, atol=0)
    assert torch.equal(result["load"], expected["load"])
    assert torch.equal(result["bias"], expected["bias"])
    for name, weight in expected["weights"].items():
        # Adam divides by the root of the second moment: where a gradient is almost 0, rounding is all there is.
        torch.testing.assert_close(
            result["weights"][name], weight, rtol=0, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert (result["weights"][name] - weight).abs().mean() < 2e-6, name


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("world", "ep_degree"), [(2, 2), (2, 1), (4, 2)])
def test_three_steps_give_the_weights_norms_and_biases_of_a_plain_loop(
    ranks: Any, expected: dict[str, Any], stage: int, world: int, ep_degree: int
) -> None:
    for result in ranks(world, trained, stage, ep_degree):
        assert_same_training(result, expected)
        assert result["updates"] == STEPS


def recomputed(reentrant: bool) -> dict[str, Any]:
    return trained(1, 2, recompute=reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recompute_leaves_the_training_as_it_is(ranks: Any, expected: dict[str, Any], reentrant: bool) -> None:
    for result in ranks(2, recomputed, reentrant):
        assert_same_training(result, expected)


def trained_in_bf16(stage: int) -> dict[str, Any]:
    engine, balancer = started(stage, 2, bf16=True)
    for step in range(STEPS):
        one_step(engine, balancer, step)
    gate = engine.module.model.layers[1].mlp.gate
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    trained_numel = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    return {
        "bias": balancer.bias_LE,
        "bias_dtype": gate.e_score_correction_bias.dtype,
        "weight_dtype": gate.weight.dtype,
        "adam_steps": [float(s["step"]) for s in optimizer.state.values()],
        "norm": float(engine.get_global_grad_norm()),
        "trained_numel": trained_numel,
        "numel": sum(p.numel() for p in engine.module.parameters()),
    }


def test_in_bf16_the_bias_is_float32_and_stages_take_the_same_steps(ranks: Any) -> None:
    results = [ranks(2, trained_in_bf16, stage) for stage in (0, 1, 2)]
    for stage, pair in enumerate(results):
        for result in pair:
            assert result["bias_dtype"] == torch.float32
            assert result["weight_dtype"] == torch.bfloat16
            assert torch.equal(result["bias"], pair[0]["bias"])
            # Steps of 0.01 survive: in bf16 a bias near 0.2 would move in steps of 2^-10.
            start = random_biases(tiny_model(), 1)
            moved = (result["bias"] - start) / RATE
            torch.testing.assert_close(moved, moved.round(), atol=1e-4, rtol=0)
            assert result["adam_steps"] == [STEPS] * len(result["adam_steps"]), stage
            assert result["norm"] == pytest.approx(results[1][0]["norm"], rel=2e-2)


def test_the_bias_is_in_no_optimizer(ranks: Any) -> None:
    for result in ranks(2, trained_in_bf16, 0):
        assert result["trained_numel"] == result["numel"]


def norm_of_four_experts() -> tuple[float, float]:
    """Four experts on two ranks, one gradient entry each: 2, 4 | 6, 8; all else 0."""
    quiet()
    model = tiny_model(n_routed_experts=4, num_experts_per_tok=2, num_hidden_layers=2)
    engine, _ = alfb_dist.initialize(model, ds_config(0, 1, clip=1.0), ep_degree=2)
    for p in engine.module.parameters():
        p.grad = torch.zeros_like(p)
    experts = engine.module.model.layers[1].mlp.experts
    for i in range(2):
        experts.gate_up_proj.grad[i, 0, 0] = 4 * dist.get_rank() + 2 * i + 2
    before = experts.gate_up_proj.grad.clone()
    norm = global_grad_norm(engine)
    engine.optimizer.step()
    clipped = experts.gate_up_proj.grad / before.clamp(min=1)
    return norm, float(clipped.max())


def test_the_clip_norm_counts_each_expert_once(ranks: Any) -> None:
    for norm, factor in ranks(2, norm_of_four_experts):
        assert norm == pytest.approx(math.sqrt(120), rel=1e-6)  # the mean of the ranks' norms would be 7.24
        assert factor == pytest.approx(1 / math.sqrt(120), rel=1e-5)


def state_of(engine: Any, balancer: Any) -> list[Tensor]:
    weights = [p.detach().clone() for p in engine.module.parameters()]
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    moments = [x.clone() for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x) and x.dim()]
    return [*weights, *moments, balancer.bias_LE, balancer.load_LE.clone()]


def not_finite_step(stage: int, bf16: bool, where: str) -> dict[str, Any]:
    """Take a normal step, one whose gradients are not finite on rank 1, and another normal one."""
    engine, balancer = started(stage, 2, bf16=bf16)
    one_step(engine, balancer, 0)
    before = state_of(engine, balancer)
    experts = engine.module.model.layers[2].mlp.experts
    hook = None
    if dist.get_rank() == 1 and where == "expert":
        hook = experts.down_proj.register_hook(lambda grad: grad.clone().index_fill_(0, torch.tensor([1]), math.nan))
    if dist.get_rank() == 1 and where == "dense":
        hook = engine.module.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    one_step(engine, balancer, 1)
    applied, after = engine.was_step_applied(), state_of(engine, balancer)
    if hook is not None:
        hook.remove()
    one_step(engine, balancer, 2)
    last = state_of(engine, balancer)
    return {
        "applied": applied,
        "same": [torch.equal(a, b) for a, b in zip(before, after)],
        "next_applied": engine.was_step_applied(),
        "next_moved": not torch.equal(before[0], last[0]),
        "next_finite": all(bool(x.isfinite().all()) for x in last),
        "skipped": engine.skipped_steps,
        "updates": balancer.num_steps,
        "load_sum": balancer.load_LE.sum(-1).tolist(),
        "bias": balancer.bias_LE,
    }


@pytest.mark.parametrize("where", ["expert", "dense"])
@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True)])
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(ranks: Any, stage: int, bf16: bool, where: str) -> None:
    results = ranks(2, not_finite_step, stage, bf16, where)
    for result in results:
        assert not result["applied"]
        assert all(result["same"]), result["same"]
        assert result["next_applied"]
        assert result["next_moved"]
        assert result["next_finite"]
        assert (result["skipped"], result["updates"]) == (1, 2)
        assert result["load_sum"] == [SEQUENCES * POSITIONS * 4] * 2  # the skipped step's tokens are not in it
        assert torch.equal(result["bias"], results[0]["bias"])


def refused(change: dict[str, Any], options: dict[str, Any]) -> str:
    model = tiny_model()
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is returned and checked
        alfb_dist.initialize(model, {**ds_config(1, 1), **change}, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, {"ep_degree": 2}, "zero_optimization.stage must be 0, 1 or 2, got 3"),
        ({"expert_parallel": {"enabled": True}}, {"ep_degree": 2}, "expert_parallel.enabled must be off"),
        ({"fp16": {"enabled": True}}, {"ep_degree": 2}, "fp16.enabled must be off"),
        ({}, {"ep_degree": 3}, "the world size (2) must be divisible by ep_degree (3)"),
        ({}, {"ep_degree": 2, "rule": "sing"}, "rule must be one of sign, proportional, rms, got 'sing'"),
        ({}, {"ep_degree": 2, "rate": -1.0}, "rate must be a finite number >= 0, got -1.0"),
    ],
)
def test_what_cannot_work_is_refused_with_its_numbers(
    ranks: Any, change: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    for message in ranks(2, refused, change, options):
        assert words in message


def stale_optimizer() -> str:
    model = tiny_model()
    groups = [{"params": list(model.parameters())}]
    with pytest.raises(ValueError, match="to be trained but not in the model") as error:
        alfb_dist.initialize(model, ds_config(1, 1), ep_degree=2, model_parameters=groups)
    return str(error.value)


def test_parameters_of_experts_from_before_the_sharding_are_refused(ranks: Any) -> None:
    for message in ranks(2, stale_optimizer):
        assert "(8, 32, 24)" in message


def by_hand(stage: int) -> dict[str, Any]:
    """parallelize, deepspeed.initialize and Balancer in a user's own script."""
    import deepspeed

    from alfb_dist.engine.initialize import start_without_compiler

    quiet()
    model = alfb_dist.parallelize(tiny_model(), ep_degree=2)
    start_without_compiler()
    config = ds_config(stage, 1)
    config["optimizer"]["params"].update(torch_adam=True, fused=True)  # what initialize takes on a CPU
    engine = deepspeed.initialize(model=model, config=config)[0]
    balancer = alfb_dist.Balancer(engine, rate=RATE)
    for step in range(STEPS):
        one_step(engine, balancer, step, 1)
    whole, balancer_2 = alfb_dist.initialize(tiny_model(), ds_config(stage, 1), ep_degree=2, rate=RATE)
    for step in range(STEPS):
        one_step(whole, balancer_2, step, 1)
    pairs = zip(engine.module.parameters(), whole.module.parameters())
    return {
        "same_weights": all(torch.equal(a, b) for a, b in pairs),
        "same_bias": torch.equal(balancer.bias_LE, balancer_2.bias_LE),
        "same_norm": float(engine.get_global_grad_norm()) == float(whole.get_global_grad_norm()),
    }


@pytest.mark.parametrize("stage", [0, 1])
def test_the_three_calls_by_hand_equal_initialize(ranks: Any, stage: int) -> None:
    for result in ranks(2, by_hand, stage):
        assert result == {"same_weights": True, "same_bias": True, "same_norm": True}
