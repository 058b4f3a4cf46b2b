"""A resumed run equals the uninterrupted one bit for bit; saving changes nothing in the run that saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoint_runs import draw, make, refusal, state_digests, stir, train
from support.ranks import run_ranks
from support.tiny import tiny_batch

from alfb_dist import checkpoint
from alfb_dist.checkpoint import optimizer

CASES: list[dict[str, Any]] = [
    {"stage": 0, "ep_degree": 2},
    {"stage": 1, "ep_degree": 2},
    {"stage": 2, "ep_degree": 2},
    {"stage": 0, "ep_degree": 2, "bf16": True},
    {"stage": 1, "ep_degree": 2, "bf16": True},
    {"stage": 1, "ep_degree": 2, "bf16": True, "grad_accum_dtype": "fp32"},  # DeepSpeed's BF16_Optimizer
]


def _uninterrupted(case: dict[str, Any], folder: Path | None) -> tuple[Any, ...]:
    """Return losses of steps 2 and 3, the state after them and random numbers; save at step 2 to `folder`, if any."""
    engine, balancer = make(**case)
    stir(1)
    train(engine, balancer, 0, 1)
    if folder is not None:
        checkpoint.save(engine, balancer, folder, step=2, state={"seed": 3, "tokens": 1 << 40})
    return train(engine, balancer, 2, 3), state_digests(engine, balancer), draw()


def _resumed(case: dict[str, Any], folder: Path) -> tuple[Any, ...]:
    """Return the same of a run that starts from that save."""
    engine, balancer = make(**case, seed=5)
    stir(2)
    state = checkpoint.load(engine, balancer, checkpoint.step_folder(folder, 2))
    assert state == {"seed": 3, "tokens": 1 << 40}
    return train(engine, balancer, 2, 3), state_digests(engine, balancer), draw()


def _back(folder: Path) -> tuple[Any, Any]:
    """Return the losses and state of a run after a save, and again after it has loaded that save."""
    engine, balancer = make(1, 2)
    train(engine, balancer, 0, 1)
    path = checkpoint.save(engine, balancer, folder, step=2, state={})
    first = train(engine, balancer, 2, 3), state_digests(engine, balancer)
    checkpoint.load(engine, balancer, path)
    return first, (train(engine, balancer, 2, 3), state_digests(engine, balancer))


def _accessors(folder: Path) -> dict[str, tuple[Any, Any]]:
    """Return an optimizer state of a dense and of an expert parameter after a load and a step.

    Each is read by DeepSpeed's accessor and from the optimizer itself.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    engine, balancer = make(1, 2)
    train(engine, balancer, 0)
    checkpoint.load(engine, balancer, checkpoint.save(engine, balancer, folder, step=1, state={}))
    train(engine, balancer, 1)
    held, found = optimizer.held(engine), {}
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.experts.down_proj"):
        part = held[name]
        seen = safe_get_full_optimizer_state(part.parameter, "exp_avg").flatten()[part.start : part.start + part.numel]
        found[name] = seen, part.part(optimizer.elementwise(engine, part)["exp_avg"]).clone()
    return found


def _before_the_first_step(folder: Path) -> tuple[Any, Any]:
    """Return the losses and state of a run after its first step, and again after a return to the save before it."""
    found = []
    engine, balancer = make(1, 2)
    path = checkpoint.save(engine, balancer, folder, step=0, state={})
    for _ in range(2):
        found.append((train(engine, balancer, 0), state_digests(engine, balancer)))
        checkpoint.load(engine, balancer, path)
    return found[0], found[1]


def _everything(folder: str) -> dict[str, Any]:
    pairs = []
    for i, case in enumerate(CASES):
        saves = Path(folder, str(i))
        pairs.append((_uninterrupted(case, saves), _resumed(case, saves)))
    others = {f.__name__: f(Path(folder, f.__name__)) for f in (_back, _before_the_first_step, _accessors)}
    return {"pairs": pairs, "never saved": _uninterrupted(CASES[1], None), **others}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of `_everything` on two ranks, once for the module, since starting engines is slow."""
    folder = tmp_path_factory.mktemp("resume")
    return run_ranks(2, _everything, str(folder / "saves"), folder=folder)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(found: list[dict[str, Any]], index: int) -> None:
    for rank in found:
        straight, resumed = rank["pairs"][index]
        assert straight[0] == resumed[0], "losses"
        keys = straight[1].keys() | resumed[1].keys()
        assert [k for k in keys if straight[1].get(k) != resumed[1].get(k)] == []
        assert straight[2] == resumed[2], "random numbers"


def test_saving_changes_nothing_in_the_run(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["pairs"][1][0] == rank["never saved"]


@pytest.mark.parametrize("when", ["_back", "_before_the_first_step"])
def test_a_run_can_go_back_to_its_own_save(found: list[dict[str, Any]], when: str) -> None:
    for rank in found:
        first, again = rank[when]
        assert first == again


def test_deepspeeds_accessors_see_the_loaded_moments_of_every_group(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for seen, own in rank["_accessors"].values():
            assert torch.equal(seen, own)


def _refusals(folder: str) -> list[str]:
    engine, balancer = make(0, 2)
    path = checkpoint.save(engine, balancer, Path(folder), step=0, state={})
    messages = [refusal(lambda: checkpoint.save(engine, balancer, Path(folder), step=1, state={"when": Path()}))]
    engine.backward(engine(**tiny_batch(0, 2, 6)).loss)
    engine.step()
    balancer.step()
    messages.append(refusal(lambda: checkpoint.save(engine, balancer, Path(folder), step=1, state={})))
    messages.append(refusal(lambda: checkpoint.load(engine, balancer, path)))
    engine, balancer = make(1, 2, round_robin=True)
    messages.append(refusal(lambda: checkpoint.save(engine, balancer, Path(folder), step=1, state={})))
    engine, balancer = make(0, 2, bf16=True)
    with torch.no_grad():
        engine.module.model.norm.weight.mul_(2)
    messages.append(refusal(lambda: checkpoint.save(engine, balancer, Path(folder), step=1, state={})))
    return messages


def test_what_cannot_be_saved_is_refused(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    for not_json, pending_save, pending_load, round_robin, masters in ranks(2, _refusals, str(tmp_path / "saves")):
        assert "must be plain JSON" in not_json
        assert "between optimizer steps" in pending_save
        assert "between optimizer steps" in pending_load
        assert "round_robin_gradients must be false" in round_robin
        assert masters.startswith("model.norm.weight differs from its master weights rounded to torch.bfloat16")
    assert [p.name for p in (tmp_path / "saves").glob("step*")] == ["step-00000000"]
