"""`alfb bench`, and the layer and the training step for other benchmarks, built by the path that users take."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def moe_layer(
    case: Any, weights: dict[str, Tensor], world: Any
) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]:
    """Return (forward, parameters) of one sigmoid-gated MoE block over `world.size` expert-parallel ranks.

    case: tokens, hidden, inter, experts, topk. weights: gate (E, D), gate_up (E, 2F, D), down (E, D, F), shared_gate
    and shared_up (F, D), shared_down (D, F). forward: (1, T, D) to the same shape; collective.
    """
    from alfb_dist.bench.block import transformers_block
    from alfb_dist.moe.parallelize import parallelize

    block = parallelize(transformers_block(case, weights), ep_degree=world.size)
    return block, list(block.parameters())


def train_step(model: nn.Module, ids: Tensor, lr: float, world: Any) -> Callable[[], Tensor]:
    """Return a function that takes a step on `ids` (B, S) through the engine and returns the loss; collective."""
    from alfb_dist.engine.initialize import initialize, quiet

    quiet()
    ds_config = {
        "train_micro_batch_size_per_gpu": ids.shape[0],
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": lr}},
    }
    engine, balancer = initialize(model, ds_config, ep_degree=world.size)

    def run() -> Tensor:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        balancer.step()
        return loss

    return run
