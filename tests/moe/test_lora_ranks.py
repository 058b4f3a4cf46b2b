"""peft's LoRA: adapters and frozen weights do not change the count; which order works, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from support.ranks import run_ranks
from support.tiny import biases, expected_load, full_weights, part, random_biases, set_biases, tiny_batch, tiny_model
from torch import Tensor, nn

import alfb_dist
from alfb_dist.engine.initialize import quiet, start_without_compiler

RATE = 0.05
ATTENTION: dict[str, Any] = {"target_modules": ["o_proj"]}
EXPERTS: dict[str, Any] = {
    "target_modules": ["o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}

# peft uses a deprecated name of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def batch() -> dict[str, Tensor]:
    return tiny_batch(1, 4, 6, padding=[0, 2, 1, 3])


def start_model() -> nn.Module:
    model = tiny_model(3)
    set_biases(model, random_biases(model, 4))
    return model


def adapted(model: nn.Module, targets: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)  # of the adapters
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **targets)).train()


def built(order: str, targets: dict[str, Any]) -> nn.Module:
    model = start_model()
    if order == "parallelize, peft":
        alfb_dist.parallelize(model, ep_degree=1)
    model = adapted(model, targets)
    return alfb_dist.parallelize(model, ep_degree=1) if order == "peft, parallelize" else model


ORDERS = [
    ("peft", ATTENTION),
    ("peft", EXPERTS),
    ("peft, parallelize", ATTENTION),
    ("parallelize, peft", ATTENTION),
    ("parallelize, peft", EXPERTS),
]


@pytest.mark.parametrize(("order", "targets"), ORDERS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_count_move_and_gradients_are_those_of_plain_peft(order: str, targets: dict[str, Any]) -> None:
    plain = adapted(start_model(), targets)
    load_LE, before = expected_load(plain, batch()), biases(plain)
    plain(**batch()).loss.backward()
    model = built(order, targets)
    balancer = alfb_dist.Balancer(model, rate=RATE)
    model(**batch()).loss.backward()
    assert balancer.step()
    assert torch.equal(balancer.load_LE, load_LE) and load_LE.sum(1).tolist() == [18 * 4] * 2
    assert torch.equal(balancer.bias_LE, alfb_dist.update_bias(before, load_LE, rate=RATE))
    gradients = [[p.grad for p in m.parameters() if p.requires_grad] for m in (model, plain)]
    assert len(gradients[0]) == len(gradients[1]) == (6 if targets is ATTENTION else 14)
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_adapted_experts_are_sharded_first() -> None:
    with pytest.raises(ValueError, match="ParamWrapper"):
        built("peft, parallelize", EXPERTS)


STEPS, LEARNING_RATE = 3, 0.05


def global_batch(step: int) -> dict[str, Tensor]:
    """4 sequences of 6 positions, of which each ends in one of padding."""
    return tiny_batch(step, 4, 6, padding=[1] * 4)


def engine_and_balancer(order: str, stage: int, dtype: str) -> tuple[Any, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
    }
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
    if order == "peft, initialize":
        return alfb_dist.initialize(adapted(start_model(), ATTENTION), config, ep_degree=2, rate=RATE)
    model = adapted(alfb_dist.parallelize(start_model(), ep_degree=2), ATTENTION)
    engine = deepspeed.initialize(model=model, config=config)[0]
    return engine, alfb_dist.Balancer(engine, rate=RATE)


CASES = [(order, stage, "float32") for order in ("peft, initialize", "parallelize, peft") for stage in (0, 1, 2)]
CASES += [("peft, initialize", 1, "bfloat16")]


def sharded() -> dict[Any, Any]:
    start_without_compiler()
    quiet(40)
    seen: dict[Any, Any] = {}
    for case in CASES:
        engine, balancer = engine_and_balancer(*case)
        steps = []
        for step in range(STEPS):
            engine.backward(engine(**part(global_batch(step), dist.get_rank(), 2)).loss)
            engine.step()
            steps.append((balancer.step(), balancer.load_LE, balancer.bias_LE, engine.get_global_grad_norm()))
        trained = [p.detach().float().clone() for p in engine.module.parameters() if p.requires_grad]
        seen[case] = steps, trained, full_weights(engine.module)
    with pytest.raises(ValueError, match="adapters of experts need ep_degree 1, got 2"):
        alfb_dist.Balancer(adapted(alfb_dist.parallelize(start_model(), ep_degree=2), EXPERTS))
    return seen


@functools.cache
def plain_loop() -> tuple[list[Any], list[Tensor], dict[str, Tensor]]:
    """The same by transformers' own model and peft in one process, counted, clipped and balanced by hand."""
    model, steps = adapted(start_model(), ATTENTION), []
    trained = [p for p in model.parameters() if p.requires_grad]
    for step in range(STEPS):
        load_LE, before = expected_load(model, global_batch(step)), biases(model)
        model(**global_batch(step)).loss.backward()
        norm = float(torch.stack([p.grad.norm() for p in trained]).norm())
        with torch.no_grad():
            for p in trained:
                p -= LEARNING_RATE * p.grad / max(1.0, norm)
                p.grad = None
        bias_LE = alfb_dist.update_bias(before, load_LE, rate=RATE)
        set_biases(model, bias_LE)
        steps.append((load_LE, bias_LE, norm))
    return steps, [p.detach() for p in trained], dict(model.named_parameters())


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks(2, sharded, folder=tmp_path_factory.mktemp("ranks"), timeout_seconds=170)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_model_with_frozen_experts_trains_and_counts_on_two_ranks_as_on_one(on_two_ranks: Any, case: Any) -> None:
    expected, adapters, weights = plain_loop()
    for seen in on_two_ranks:
        steps, trained, whole = seen[case]
        for (acted, load_LE, bias_LE, norm), (plain_load_LE, plain_bias_LE, plain_norm) in zip(steps, expected):
            assert acted and load_LE.sum(1).tolist() == [20 * 4] * 2
            if case[2] == "float32":
                assert torch.equal(load_LE, plain_load_LE) and torch.equal(bias_LE, plain_bias_LE)
            assert norm == pytest.approx(plain_norm, rel=1e-4 if case[2] == "float32" else 0.1)
        for ours, theirs in zip(trained, adapters, strict=True):
            close = {"rtol": 1e-4, "atol": 1e-6} if case[2] == "float32" else {"rtol": 0.1, "atol": 2e-2}
            torch.testing.assert_close(ours, theirs, **close)
        experts = {n.split("model.", 1)[1]: w for n, w in whole.items() if "experts." in n and "shared" not in n}
        kept = {n.split("model.", 1)[1]: w for n, w in weights.items() if "experts." in n and "shared" not in n}
        assert len(experts) == 4 and experts.keys() == kept.keys()
        for name, w in experts.items():  # each rank still has its own
            assert torch.equal(w, kept[name].to(w.dtype)), name


def test_plain_loop_trains_and_moves() -> None:
    steps, trained, _ = plain_loop()
    start = [p for p in adapted(start_model(), ATTENTION).parameters() if p.requires_grad]
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(start, trained)) and steps[0][2] > 0
    assert not torch.equal(steps[0][1], steps[-1][1])
