"""Training from a transformers directory: no rank builds the whole model, and the run equals that of the whole one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.checkpoint_runs import refusal
from support.hub_folders import opened_readers
from support.ranks import run_ranks
from support.tiny import biases, random_biases, set_biases, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import alfb_dist
from alfb_dist.cli import main
from alfb_dist.config import Config, ConfigError, load_config
from alfb_dist.engine.initialize import quiet
from alfb_dist.pretrained import from_hf
from alfb_dist.training import loop as loop
from alfb_dist.training import run as runs

TOML = """
[run]
name = "on"
folder = "{folder}/runs"
[model]
path = "{folder}/released"
[parallel]
ep_degree = 2
[balance]
mode = "train"
[optimizer]
lr = 1e-2
[data]
source = ["{folder}/text"]
cache = "{folder}/cache"
sequence_length = 16
validation_fraction = 0.5
[train]
steps = 2
global_batch = 4
micro_batch = 1
[report]
progress = false
wandb = "disabled"
html = false
"""


def released(folder: Path, **sizes: Any) -> nn.Module:
    """Write a tiny model to folder/released, texts and a configuration to train it; return the model."""
    model = tiny_model(3, vocab_size=320, **sizes)
    set_biases(model, random_biases(model, 4) + 8)
    model.save_pretrained(folder / "released")
    (folder / "text").mkdir()
    for name in "abcd":
        (folder / "text" / f"{name}.txt").write_text(f"{name}: a bias for every expert\n" * 50)
    (folder / "on.toml").write_text(TOML.format(folder=folder))
    return model


def whole_model(config: Config, *, resumed: bool) -> nn.Module:
    """Return the model that a run would build if every rank read all of it."""
    torch.manual_seed(config.run.seed)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    return model.train()


def trained(folder: Path, name: str, whole: bool) -> None:
    if whole:
        runs.build_model = whole_model
    loop.train(load_config(folder / "on.toml", [f"run.name='{name}'"], world_size=dist.get_world_size()))


def recorded(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the metrics of a run without times, and its number of parameters."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if k not in ("step_seconds", "tokens_per_second")} for line in lines]
    return timeless, json.loads((folder / "config.json").read_text())["num_parameters"]


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Return a directory with a released model and the run `shares` from it, and the model's number of parameters."""
    folder = tmp_path_factory.mktemp("training")
    model = released(folder)
    run_ranks(2, trained, folder, "shares", False, folder=folder)
    return folder, sum(p.numel() for p in model.parameters())


def test_run_from_a_directory_equals_the_run_of_the_whole_model(trained_once: tuple[Path, int]) -> None:
    folder, expected = trained_once
    run_ranks(2, trained, folder, "whole", True, folder=folder)
    steps, num_parameters = recorded(folder / "runs" / "shares")
    assert (steps, num_parameters) == recorded(folder / "runs" / "whole")
    assert num_parameters == expected
    assert steps[1]["loss"] != steps[0]["loss"] and steps[0]["bias_range"] > 0


def resumed(folder: Path, *settings: str) -> None:
    loop.train(load_config(folder / "on.toml", [*settings, "run.resume=true"], world_size=dist.get_world_size()))


def test_run_from_an_imported_checkpoint_equals_the_run_from_its_directory(trained_once: tuple[Path, int]) -> None:
    folder, _ = trained_once
    from_hf(folder / "released", folder / "runs" / "imported")
    run_ranks(2, resumed, folder, "run.name='imported'", folder=folder)
    assert recorded(folder / "runs" / "imported") == recorded(folder / "runs" / "shares")
    saves = [p.name for p in sorted((folder / "runs" / "imported" / "checkpoints").glob("step-*"))]
    assert saves == ["step-00000000", "step-00000002"]


def start_imported(folder: Path) -> list[tuple[list[str], Tensor, list[str]]]:
    found = []
    for mode in ("auto", "recentre"):
        run = runs.start(load_config(folder / "new.toml", ["run.resume=true", f"balance.mode='{mode}'"], world_size=2))
        found.append((run.balancer.modes, run.balancer.bias_LE, run.messages))
    return found


def test_imported_biases_freeze_unless_a_mode_is_named_and_are_recentred_if_asked(tmp_path: Path) -> None:
    """Also where the configuration has the model's sizes, and not its directory."""
    model: Any = released(tmp_path)
    from_hf(tmp_path / "released", tmp_path / "runs" / "on")
    derived = ("qk_head_dim", "head_dim")
    sizes = {k: v for k, v in model.config.to_diff_dict().items() if type(v) in (int, float) and k not in derived}
    table = "\n".join(f"{key} = {value}" for key, value in sizes.items())
    by_sizes = f'family = "deepseek_v3"\n[model.config]\n{table}'
    toml = (tmp_path / "on.toml").read_text().replace(f'path = "{tmp_path}/released"', by_sizes)
    (tmp_path / "new.toml").write_text(toml)
    raw_LE = biases(model)
    centred_LE = (raw_LE.double() - raw_LE.double().mean(-1, keepdim=True)).float()
    for (modes, bias_LE, notes), centred in run_ranks(2, start_imported, tmp_path, folder=tmp_path):
        assert modes == ["freeze"] * 2 and torch.equal(bias_LE, raw_LE)
        assert any("stay as released" in note for note in notes) and not any("changed since" in n for n in notes)
        assert centred[0] == ["recentre"] * 2 and torch.equal(centred[1], centred_LE)


def sizes_of_start(folder: Path) -> tuple[int, int]:
    """Return the bytes that this rank reads of the directory for a run, and those of its largest parameter."""
    with opened_readers() as opened:
        run = runs.start(load_config(folder / "on.toml", world_size=2))
    return sum(reader.bytes_read for reader in opened), max(p.numel() * 4 for p in run.engine.module.parameters())


def test_rank_of_a_run_reads_its_share_only(tmp_path: Path) -> None:
    model = released(tmp_path, n_routed_experts=16)
    experts = [p.numel() * 4 for name, p in model.named_parameters() if ".experts." in name]
    total = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    for read, largest in run_ranks(2, sizes_of_start, tmp_path, folder=tmp_path):
        assert read == total - sum(experts) // 2 and largest < max(experts)


def test_dry_run_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    released(tmp_path)
    (tmp_path / "released" / "model.safetensors").unlink()
    assert main(["train", str(tmp_path / "on.toml"), "--dry-run"]) == 0
    assert "parameters in all" in capsys.readouterr().out


def refused_run(folder: Path) -> str:
    return refusal(lambda: runs.start(load_config(folder / "on.toml", world_size=2)), ConfigError)


def test_directory_without_weights_is_refused_on_every_rank(tmp_path: Path) -> None:
    released(tmp_path)
    (tmp_path / "released" / "model.safetensors").unlink()
    messages = run_ranks(2, refused_run, tmp_path, folder=tmp_path)
    assert messages[0] == messages[1] and "model.path" in messages[0] and "model.safetensors" in messages[0]


DS_CONFIG = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}


def initialised(folder: Path) -> tuple[list[str], Tensor, float]:
    """Return the refusals of a model that was read for 2 ranks, the loads of a step on it, and its alpha."""
    quiet()
    warnings.simplefilter("error", UserWarning)  # a model in evaluation mode would raise one
    model = alfb_dist.from_pretrained(folder / "released", ep_degree=2, sequence_loss_alpha=0.25)
    assert not model.training
    others: list[dict[str, Any]] = [{"batch_loss_alpha": 0.5}, {"max_rows": 8}]
    asked: list[dict[str, Any]] = [{"ep_degree": 1}, *({"ep_degree": 2, **other} for other in others)]
    refusals = [refusal(lambda a=a: alfb_dist.initialize(model, DS_CONFIG, **a)) for a in asked]  # type: ignore[misc]
    engine, balancer = alfb_dist.initialize(model, DS_CONFIG, ep_degree=2)
    engine.backward(engine(**tiny_batch(dist.get_rank(), 1, 6)).loss)
    engine.step()
    balancer.step()
    return refusals, balancer.load_LE, balancer.gates[0].aux.sequence_alpha


def test_initialize_takes_a_parallelised_model_as_it_is_and_refuses_another_degree(tmp_path: Path) -> None:
    released(tmp_path)
    for refusals, load_LE, alpha in run_ranks(2, initialised, tmp_path, folder=tmp_path):
        assert "ep_degree (1)" in refusals[0] and "(2)" in refusals[0]
        assert "(0.0, 0.5)" in refusals[1] and "(0.25, 0.0)" in refusals[1]
        assert "max_rows (8)" in refusals[2]
        assert load_LE.sum(1).tolist() == [2 * 6 * 4] * 2 and alpha == 0.25
