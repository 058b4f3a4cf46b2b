"""`alfb checkpoint` on transformers directories and checkpoints: inspect, compare, convert, and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_runs import refusal
from support.hub_folders import assert_same, loaded, mixtral
from support.tiny import random_biases, set_biases, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

import alfb_dist
from alfb_dist.cli import main
from alfb_dist.data.token_writer import TokenWriter
from alfb_dist.pretrained import from_hf
from alfb_dist.pretrained.logits import compare, random_tokens, read_folder

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def write(folder: Path, *, hub: bool = True) -> dict[str, Tensor]:
    """Write a tiny model with biases far from 0, a tokenizer's file and generation settings; return its state dict."""
    model = tiny_model(3)
    set_biases(model, random_biases(model, 5) + 8)
    model.generation_config = GenerationConfig(max_new_tokens=7)
    model.save_pretrained(folder, save_original_format=hub)
    (folder / "tokenizer.json").write_text("{}")
    return {name: x.clone() for name, x in model.state_dict().items()}


def change(folder: Path, name: str, by: float) -> None:
    """Add to one element of a tensor."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[1] += by
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def alfb(*words: Any) -> int:
    return main(["checkpoint", *map(str, words)])


def test_released_model_becomes_a_checkpoint_and_a_directory_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = write(tmp_path / "released")
    assert alfb("from-hf", tmp_path / "released", tmp_path / "runs" / "mine") == 0
    save = tmp_path / "runs" / "mine" / "checkpoints" / "step-00000000"
    assert "run.resume=true" in capsys.readouterr().out
    assert alfb("verify", save) == 0 and alfb("inspect", save) == 0
    assert "'model.layers.2.mlp.experts': 8" in capsys.readouterr().out
    assert alfb("to-hf", save, tmp_path / "again") == 0
    assert_same(loaded(tmp_path / "again"), expected)
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["max_new_tokens"] == 7
    assert (tmp_path / "again" / "tokenizer.json").is_file()
    for pair in ((save, tmp_path / "released"), (tmp_path / "released", tmp_path / "again"), (save, save)):
        assert alfb("verify", pair[0], "--against", pair[1], "--tokens", 40) == 0
    assert alfb("from-hf", tmp_path / "released", tmp_path / "runs" / "mine") == 78


@pytest.mark.parametrize(
    ("name", "by", "tolerance", "code"),
    [
        ("model.layers.1.mlp.experts.3.up_proj.weight", 0.01, 0.0, 1),
        ("model.layers.1.mlp.experts.3.up_proj.weight", 0.01, 1.0, 0),
        ("lm_head.weight", 0.5, 1e-3, 1),
        (BIAS, 1e-5, 0.0, 1),  # too small to change a selection
        (BIAS, 1e-5, 1.0, 1),
    ],
)
def test_verify_reports_any_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, by: float, tolerance: float, code: int
) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder)
    change(tmp_path / "b", name, by)
    against = ("--against", tmp_path / "b", "--tokens", 40, "--tolerance", tolerance)
    assert alfb("verify", tmp_path / "a", *against) == code
    shown = capsys.readouterr().out
    assert ("not the same" in shown) == bool(code) and "of 40" in shown


def test_compared_figures_are_those_of_the_models(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder)
    change(tmp_path / "b", "model.norm.weight", 3.0)
    change(tmp_path / "b", BIAS, 0.25)
    ids_T = random_tokens(50, 61)
    found = compare([lambda: read_folder(tmp_path / "a"), lambda: read_folder(tmp_path / "b")], ids_T)
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(tmp_path / f) for f in ("a", "b")]
        a, b = (m(input_ids=ids_T[None]).logits[0] for m in models)
    assert found.max_logit_difference == pytest.approx(float((a - b).abs().max()), rel=1e-5)
    assert found.same_best == int((a.argmax(-1) == b.argmax(-1)).sum()) < 50
    assert not found.same_bits and found.max_bias_difference == pytest.approx(0.25, abs=1e-6)


def test_verify_reads_token_ids_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a")
    (tmp_path / "ids.json").write_text("[1, 2, 3, 60]")
    with TokenWriter(tmp_path / "ids.bin", vocab_size=61, end_id=0, tokenizer="none") as file:
        file.add([5, 6, 0])
    for tokens, count in ((tmp_path / "ids.json", 4), (tmp_path / "ids.bin", 4)):
        assert alfb("verify", tmp_path / "a", "--against", tmp_path / "a", "--tokens", tokens) == 0
        assert f"{count} of {count}" in capsys.readouterr().out
    (tmp_path / "ids.json").write_text("[1, 61]")
    assert alfb("verify", tmp_path / "a", "--against", tmp_path / "a", "--tokens", tmp_path / "ids.json") == 78
    assert "token ids must be below 61" in capsys.readouterr().err


def test_reshard_changes_the_layout_and_the_files_and_nothing_else(tmp_path: Path) -> None:
    expected = write(tmp_path / "hub")
    fused, back = tmp_path / "fused", tmp_path / "back"
    assert alfb("reshard", tmp_path / "hub", fused, "--layout", "fused", "--max-shard-bytes", 30_000) == 0
    names = json.loads((fused / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.1.mlp.experts.gate_up_proj" in names and len(set(names.values())) > 3
    assert_same(loaded(fused), expected)
    assert alfb("reshard", fused, back, "--layout", "per_expert", "--ep", 4) == 0
    assert_same(load_file(back / "model.safetensors"), load_file(tmp_path / "hub" / "model.safetensors"))
    assert (back / "tokenizer.json").is_file() and (back / "generation_config.json").is_file()
    assert alfb("reshard", fused, tmp_path / "x", "--ep", 3) == 78 and not (tmp_path / "x").exists()
    assert alfb("reshard", fused) == 78


def test_reshard_of_a_checkpoint_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "released")
    save = from_hf(tmp_path / "released", tmp_path / "run")
    assert alfb("reshard", save, tmp_path / "x", "--ep", 4) == 0
    assert "nothing was written" in capsys.readouterr().out and not (tmp_path / "x").exists()
    assert alfb("reshard", save, "--ep", 3) == 78
    damaged = next(save.glob("tensors-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert alfb("reshard", save, "--ep", 4) == 78
    assert damaged.name in capsys.readouterr().err


def test_inspect_shows_layout_types_and_whether_biases_were_rounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[BIAS] = tensors[BIAS].bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert alfb("inspect", tmp_path) == 0
    shown = capsys.readouterr().out
    other = expected[BIAS.replace("1", "2")]
    assert "layout: per_expert" in shown and f"files: 1\ntensors: {len(tensors)}" in shown
    assert "bfloat16, rounded to 16 bits" in shown and "float32, not rounded" in shown
    assert f"{float(other.min()):.6g} to {float(other.max()):.6g}" in shown
    assert alfb("verify", tmp_path) == 0
    del tensors["model.layers.2.mlp.experts.7.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert alfb("verify", tmp_path) == alfb("inspect", tmp_path) == 78


def test_added_bias_is_converted_from_its_sidecar_to_a_checkpoint_and_back(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "plain")
    model = alfb_dist.from_pretrained(tmp_path / "plain", ep_degree=1)
    model.model.layers[1].mlp.gate.selection_bias.copy_(torch.tensor([0.5, -0.25, 0.0, 0.125]))
    with pytest.warns(UserWarning, match="routes without"):
        alfb_dist.save_pretrained(model, tmp_path / "biased", bias_sidecar=True)
    save = from_hf(tmp_path / "biased", tmp_path / "run")
    assert alfb("to-hf", save, tmp_path / "x") == 78
    assert alfb("to-hf", save, tmp_path / "again", "--bias-sidecar") == 0
    assert_same(alfb_dist.from_pretrained(tmp_path / "again", ep_degree=1).state_dict(), model.state_dict())
    assert alfb("verify", save, "--against", tmp_path / "again") == 0
    assert alfb("verify", save, "--against", tmp_path / "plain") == 1


def test_directory_that_is_neither_is_refused(tmp_path: Path) -> None:
    assert alfb("inspect", tmp_path) == 78 and alfb("inspect", tmp_path / "none") == 78
    write(tmp_path / "a")
    assert "not empty" in refusal(lambda: from_hf(tmp_path / "a", tmp_path / "a"))
