"""The auxiliary losses over ranks: the mean of the ranks' gradients is the gradient of the loss over all tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.aux_losses import ALPHA, assert_adds, make_model, mask_of, slow_batch_loss, slow_sequence_loss
from support.ranks import run_ranks
from support.tiny import TOP_K, full_gradients, gates, tiny_batch
from torch import Tensor

from alfb_dist.moe.parallelize import parallelize

Ranks = Callable[..., list[Any]]
WORLD = 2
# Rank 1 has less than half of rank 0's unpadded tokens.
BATCHES = [tiny_batch(1, 3, 5, padding=[0, 0, 1]), tiny_batch(2, 3, 5, padding=[4, 2, 3])]
RUNS: dict[str, tuple[int, str, dict[str, float]]] = {
    f"{kind}, EP {ep}, {checkpointing}": (ep, checkpointing, {f"{kind}_loss_alpha": ALPHA} if kind != "none" else {})
    for kind, ep, checkpointing in [
        ("none", 1, "none"),
        ("batch", 1, "none"),
        ("batch", 2, "none"),
        ("batch", 2, "non-reentrant"),
        ("batch", 2, "reentrant"),
        ("sequence", 1, "none"),
        ("sequence", 2, "reentrant"),
    ]
}


def mean_gradients() -> dict[str, dict[str, Tensor]]:
    """For each run, the mean over ranks of the gradients, experts gathered; rank 0's, as all have the same."""
    results = {}
    for name, (ep, checkpointing, alphas) in RUNS.items():
        model = parallelize(make_model(3, checkpointing=checkpointing), ep_degree=ep, **alphas)
        model(**BATCHES[dist.get_rank()]).loss.backward()
        results[name] = {n: g / WORLD for n, g in full_gradients(model).items()}
    return results if dist.get_rank() == 0 else {}


@pytest.fixture(scope="module")
def by_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    return run_ranks(WORLD, mean_gradients, folder=tmp_path_factory.mktemp("ranks"))[0]


def whole_batch_gradients(kind: str) -> dict[str, Tensor]:
    """The written-out loss over the tokens of both ranks at once, in transformers' own model in this process."""
    model, seen = make_model(3), []
    hooks = [g.register_forward_hook(lambda _, __, out: seen.append(out)) for g in gates(model)]
    for batch in BATCHES:
        model(**batch)
    for hook in hooks:
        hook.remove()
    masks_BS, num_layers = [mask_of(batch) for batch in BATCHES], len(hooks)
    total = torch.zeros((), dtype=torch.float64)
    for layer in range(num_layers):
        outputs = [seen[layer], seen[num_layers + layer]]
        scores_TE = torch.cat([logits.double().sigmoid() for logits, _, _ in outputs])
        if kind == "sequence":
            mask_BS = torch.cat(masks_BS)
            total = total + slow_sequence_loss(scores_TE.unflatten(0, mask_BS.shape), mask_BS, TOP_K)
        else:
            mask_T = torch.cat(masks_BS).flatten()
            ids_TK = torch.cat([ids for _, _, ids in outputs])
            load_E = torch.bincount(ids_TK[mask_T].flatten(), minlength=scores_TE.shape[1]).tolist()
            total = total + slow_batch_loss(scores_TE[mask_T], load_E, TOP_K)
    (ALPHA * total).backward()
    zero = torch.zeros((), dtype=torch.float64)
    return {n: zero.expand_as(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("run", [run for run in RUNS if not run.startswith("none")])
def test_mean_over_ranks_is_the_gradient_of_the_loss_over_all_tokens(
    run: str, by_run: dict[str, dict[str, Tensor]]
) -> None:
    expected = whole_batch_gradients(run.split(",")[0])
    assert_adds(by_run[run], by_run["none, EP 1, none"], expected)


def test_ranks_have_different_numbers_of_tokens() -> None:
    assert [int(mask_of(batch).sum()) for batch in BATCHES] == [14, 6]
