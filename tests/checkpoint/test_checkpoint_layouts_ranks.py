"""A save loads at any expert-parallel degree, number of ranks and ZeRO stage, every tensor bit for bit."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.checkpoint_runs import digest, make, mean_loss, refusal, train
from support.ranks import run_ranks
from support.tiny import biases, full_weights, random_biases, set_biases

from alfb_dist import checkpoint
from alfb_dist.checkpoint import SaveError, files, manifest, optimizer, share, tensors, write_order

# One dense and one MoE layer, so that partitions cut through an expert.
SIX = {"n_routed_experts": 6, "num_hidden_layers": 2}
LAYOUTS = [(stage, ep_degree) for stage in (0, 1, 2) for ep_degree in (1, 2)]
ODD_VALUES = [-0.0, 1e-42, -3e38, 0.1 + 2**-26]


def _plant(engine: Any, balancer: Any) -> None:
    """Set elements of the biases, a master weight and a moment to values that sums or casts would lose."""
    bias_LE = random_biases(engine.module, 7, low=5.0, high=35.0)
    bias_LE[0, : len(ODD_VALUES)] = torch.tensor(ODD_VALUES)
    set_biases(engine.module, bias_LE)
    for name in ("model.norm.weight", "model.layers.1.mlp.experts.down_proj"):
        part = optimizer.held(engine)[name]
        for kind in ("weight", "exp_avg"):
            flat = part.part(optimizer.elementwise(engine, part)[kind])
            flat[: len(ODD_VALUES)] = torch.tensor([-0.0] * len(ODD_VALUES))[: len(flat)]
    optimizer.refresh_model(engine)


def _hashes(path: Path) -> dict[str, str]:
    return {key: found["xxh3_128"] for key, found in manifest.read(path)["tensors"].items()}


def _save_all(folder: str, layouts: list[tuple[int, int]], model: dict[str, Any]) -> list[Any]:
    """Take two steps in each layout, save, and take one more; return paths, biases and the losses after each."""
    found = []
    for stage, ep_degree in layouts:
        engine, balancer = make(stage, ep_degree, **model)
        train(engine, balancer, 0, 1)
        _plant(engine, balancer)
        path = checkpoint.save(engine, balancer, Path(folder, f"{stage}-{ep_degree}"), step=2, state={})
        loss = mean_loss(engine, 2)
        train(engine, balancer, 2)
        found.append((str(path), biases(engine.module), loss, mean_loss(engine, 3)))
    return found


def _load_all(
    folder: str, saves: list[Any], layouts: list[tuple[int, int]], model: dict[str, Any]
) -> list[dict[str, Any]]:
    """Load each save in each layout; return the hashes of a new save, the model's weights and the losses after them.

    Another step is taken from the first and the last save only.
    """
    found = []
    for stage, ep_degree in layouts:
        engine, balancer = make(stage, ep_degree, seed=9, **model)
        for path, *_ in saves:
            checkpoint.load(engine, balancer, Path(path))
            again = checkpoint.save(engine, balancer, Path(folder, "again"), step=2, state={})
            weights = {name: digest(x.float()) for name, x in full_weights(engine.module).items()}
            found.append({"save": path, "hashes": _hashes(again), "weights": weights, "loss": mean_loss(engine, 2)})
            if path in (saves[0][0], saves[-1][0]):
                train(engine, balancer, 2)
                found[-1]["after"] = biases(engine.module), mean_loss(engine, 3)
    return found


def _cross(
    folder: str, layouts: list[tuple[int, int]], model: dict[str, Any]
) -> tuple[list[Any], list[dict[str, Any]]]:
    saves = _save_all(folder, layouts, model)
    return saves, _load_all(folder, saves, layouts, model)


def _check(saves: list[Any], loads: list[dict[str, Any]], *, bf16: bool, tolerance: float) -> None:
    by_path = {path: rest for path, *rest in saves}
    for load in loads:
        path = Path(load["save"])
        assert load["hashes"] == _hashes(path)
        assert load["weights"] == _weights(path, bf16)
        bias_LE, loss, later_loss = by_path[load["save"]]
        assert load["loss"] == pytest.approx(loss, rel=tolerance)
        if "after" in load:
            assert load["after"][1] == pytest.approx(later_loss, rel=tolerance), "the moments are not those saved"
            assert bf16 or torch.equal(load["after"][0].view(torch.int32), bias_LE.view(torch.int32))


def _weights(path: Path, bf16: bool) -> dict[str, str]:
    """Return the hash of each whole parameter of the model, from the files alone."""
    from safetensors.torch import load_file

    parts: dict[str, dict[int, torch.Tensor]] = {}
    for file in path.glob("tensors-*.safetensors"):
        for key, x in load_file(file).items():
            kind, _, name = key.partition("/")
            parameter, _, expert = name.partition("/")
            if kind == "weight":
                parts.setdefault(parameter, {})[int(expert or -1)] = x.bfloat16().float() if bf16 else x
    return {
        name: digest(found[-1] if -1 in found else torch.stack([found[e] for e in range(len(found))]))
        for name, found in parts.items()
    }


def test_every_layout_loads_the_save_of_every_other(tmp_path: Path) -> None:
    for saves, loads in run_ranks(2, _cross, str(tmp_path / "saves"), LAYOUTS, SIX, folder=tmp_path):
        assert len(loads) == len(LAYOUTS) ** 2
        _check(saves, loads, bf16=False, tolerance=1e-5)
    assert len({tuple(sorted(_hashes(Path(path)).keys())) for path, *_ in saves}) == 1


def test_master_weights_and_biases_survive_bf16_at_another_layout(tmp_path: Path) -> None:
    layouts, model = [(0, 2), (1, 1)], {**SIX, "bf16": True, "frozen": ("model.embed_tokens.weight",)}
    for saves, loads in run_ranks(2, _cross, str(tmp_path / "saves"), layouts, model, folder=tmp_path):
        _check(saves, loads, bf16=True, tolerance=1e-2)


def test_four_ranks_save_what_two_load(tmp_path: Path) -> None:
    saves = run_ranks(4, _save_all, str(tmp_path / "saves"), [(1, 2)], {}, folder=tmp_path)[0]
    loads = run_ranks(2, _load_all, str(tmp_path / "more"), saves, [(2, 2), (0, 1)], {}, folder=tmp_path)[0]
    _check(saves, loads, bf16=False, tolerance=1e-5)


def _save_small_files(folder: str) -> tuple[list[str], bool]:
    share.MAX_FILE_BYTES, write_order.BATCH_BYTES = 20_000, 7_000
    engine, balancer = make(1, 1, **SIX)
    train(engine, balancer, 0)
    create, calls = files.create, []

    def full(path: Path) -> Any:
        calls.append(path)
        if len(calls) == 3 and dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, "full")
        return create(path)

    files.create = full
    message = refusal(lambda: checkpoint.save(engine, balancer, Path(folder, "small"), step=1, state={}), SaveError)
    assert message.startswith("rank 1: ") and "tensors-00001-002.safetensors" in message
    files.create = create
    small = checkpoint.save(engine, balancer, Path(folder, "small"), step=1, state={})
    share.MAX_FILE_BYTES, write_order.BATCH_BYTES = 1 << 30, 1 << 25
    whole = checkpoint.save(engine, balancer, Path(folder, "whole"), step=1, state={})
    checkpoint.load(engine, balancer, small)
    return [p.name for p in small.glob("tensors*") if p.stat().st_size <= 25_000], _hashes(small) == _hashes(whole)


def test_a_save_in_small_files_and_batches_is_the_same_and_a_rank_may_fail_between_them(tmp_path: Path) -> None:
    for small_files, same in run_ranks(2, _save_small_files, str(tmp_path / "saves"), folder=tmp_path):
        assert same
        assert len(small_files) > 6


def _uneven(folder: str) -> tuple[Any, Any]:
    engine, balancer = make(0, 1, **SIX)
    train(engine, balancer, 0, 1)
    late = engine.module.model.norm.weight
    engine.optimizer.state[late]["step"].fill_(1)
    path = checkpoint.save(engine, balancer, Path(folder), step=2, state={})
    engine.optimizer.state[late]["step"].fill_(9)
    checkpoint.load(engine, balancer, path)
    whole = engine.optimizer.state[late]["step"].item()
    engine, balancer = make(1, 1, **SIX)
    checkpoint.load(engine, balancer, path)
    return whole, [state["step"].item() for state in engine.optimizer.state.values()]


def test_a_flat_partition_takes_the_highest_step_count_of_its_parameters(tmp_path: Path) -> None:
    [(whole, flat)] = run_ranks(1, _uneven, str(tmp_path / "saves"), folder=tmp_path)
    assert whole == 1
    assert flat == [2, 2]


def _plan(world: int, ep_degree: int) -> Any:
    found = [
        tensors.GlobalTensor("a", None, (100,), None, 0),
        tensors.GlobalTensor("b", None, (50,), None, 0),
        *(tensors.GlobalTensor("c", e, (10,), e // (4 // ep_degree), 10 * (e % (4 // ep_degree))) for e in range(4)),
    ]
    return found, tensors.writers(found, ep_degree, world)


def test_each_tensor_is_written_by_a_rank_that_holds_it() -> None:
    for world, ep_degree in ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 2)):
        found, writers = _plan(world, ep_degree)
        for tensor, writer in zip(found, writers):
            assert 0 <= writer < world
            assert tensor.position in (None, writer % ep_degree)


def test_writers_share_the_work() -> None:
    _, writers = _plan(4, 2)
    assert writers[2:] == [0, 2, 1, 3], "the experts go round the replicas of their position"
    assert writers[0] != writers[1], "the largest dense tensors go to different ranks"
