"""Small training runs that save and load, called on ranks."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from support.tiny import tiny_batch, tiny_model
from torch import Tensor

PARTS = 4
"""The number of micro-batches of a step, over all ranks and accumulations."""


def make(
    stage: int,
    ep_degree: int,
    *,
    bf16: bool = False,
    seed: int = 0,
    grad_accum_dtype: str | None = None,
    optimizer: str = "AdamW",
    scheduler: bool = True,
    round_robin: bool = False,
    frozen: tuple[str, ...] = (),
    **overrides: Any,
) -> tuple[Any, Any]:
    """Return an engine and its balancer; overrides: keys of the model's configuration."""
    import alfb_dist
    from alfb_dist.engine.initialize import quiet

    quiet()
    warnings.simplefilter("ignore")
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": PARTS // dist.get_world_size(),
        "gradient_clipping": 0.5,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "zero_optimization": {"stage": stage, "round_robin_gradients": round_robin},
        "bf16": {"enabled": bool(bf16)},
        "data_types": {"grad_accum_dtype": grad_accum_dtype},
    }
    if scheduler:
        config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 5}}
    model = tiny_model(seed, **overrides)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return alfb_dist.initialize(model, config, ep_degree=ep_degree, rate=0.01)


def train(engine: Any, balancer: Any, *steps: int) -> list[float]:
    """Train for these steps and return this rank's losses; a step's global batch is the same at any world size."""
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in steps:
        whole = tiny_batch(1000 + step, 2 * PARTS, 6)
        for i in range(PARTS // world):
            first = 2 * (i * world + rank)
            loss = engine(**{name: x[first : first + 2] for name, x in whole.items()}).loss
            engine.backward(loss)
            engine.step()
            balancer.step()
            losses.append(loss.item())
    return losses


def mean_loss(engine: Any, step: int) -> float:
    """Return the loss of a step's global batch, without training on it."""
    with torch.no_grad():
        return float(engine(**tiny_batch(1000 + step, 2 * PARTS, 6)).loss)


def digest(x: Tensor) -> str:
    """Return the xxh3-128 of a tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def state_digests(engine: Any, balancer: Any) -> dict[str, Any]:
    """Return hashes of this rank's state: model and master weights, moments, bias, loads, counts, random state."""
    from alfb_dist.checkpoint import optimizer, rng

    found: dict[str, Any] = {f"model/{n}": digest(x) for n, x in engine.module.state_dict().items()}
    for name, part in optimizer.held(engine).items():
        for kind, whole in optimizer.elementwise(engine, part).items():
            found[f"{kind}/{name}"] = digest(part.part(whole))
        found[f"numbers/{name}"] = optimizer.numbers(engine, part)
    found["load"], found["num_steps"] = digest(balancer.load_LE), balancer.num_steps
    counters = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
    found["counters"] = [getattr(engine, name) for name in counters]
    found["lr"] = engine.get_lr()
    found["random"] = rng.capture()
    return found


def draw() -> list[float]:
    """Return one number of each random generator."""
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def stir(seed: int) -> None:
    """Seed the random generators, each rank differently."""
    value = 100 * seed + dist.get_rank()
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    random.gauss(0, 1)
    np.random.randn()


def refusal(attempt: Callable[[], object], error: type[Exception] = ValueError) -> str:
    """Return the message of the error that the attempt raises. Raises AssertionError if it raises none."""
    try:
        attempt()
    except error as e:
        return str(e)
    raise AssertionError("nothing was refused")
