"""Reading a transformers folder on ranks and writing it again: the same weights, files and biases, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_runs import make, refusal, train
from support.hub_folders import assert_same, loaded, mixtral, opened_readers
from support.ranks import run_ranks
from support.tiny import random_biases, set_biases, tiny_model
from torch import Tensor

import alfb_dist
from alfb_dist.cli import main
from alfb_dist.pretrained import to_hf


def write(folder: Path, *, hub: bool = True, size: str = "5GB") -> dict[str, Tensor]:
    """A tiny model with biases, written by transformers; its state dict."""
    model = tiny_model(3)
    set_biases(model, random_biases(model, 5))
    model.save_pretrained(folder, save_original_format=hub, max_shard_size=size)
    (folder / "tokenizer.json").write_text("{}")
    return {name: x.clone() for name, x in model.state_dict().items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_and_write(source: Path, out: Path, ep_degree: int, layout: str) -> None:
    model = alfb_dist.from_pretrained(source, ep_degree=ep_degree)
    alfb_dist.save_pretrained(model, out, layout=layout, max_shard_bytes=20_000)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_round_trip_is_exact_and_files_equal_for_ep_1_2_4(tmp_path: Path, layout: str) -> None:
    expected = write(tmp_path / "source", hub=layout == "fused", size="20KB")
    for world in (1, 2, 4):
        run_ranks(world, read_and_write, tmp_path / "source", tmp_path / f"{world}", world, layout, folder=tmp_path)
    assert_same(loaded(tmp_path / "4"), expected)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "4")
    assert "tokenizer.json" in contents(tmp_path / "1")


def test_bfloat16_reads_as_transformers_does_and_bias_stays_float32(tmp_path: Path) -> None:
    expected = write(tmp_path)
    found = alfb_dist.from_pretrained(tmp_path, ep_degree=1, dtype=torch.bfloat16).state_dict()
    assert_same(found, loaded(tmp_path, dtype=torch.bfloat16))
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert found[bias].dtype == torch.float32 and torch.equal(found[bias], expected[bias])


def train_and_write(folder: Path) -> None:
    engine, balancer = make(1, 2)
    train(engine, balancer, 1, 2)
    alfb_dist.save_pretrained(engine, folder / "model")
    alfb_dist.save_pretrained(engine, folder / "masters", masters=True)


def test_engine_under_zero_1_writes_a_loadable_model(tmp_path: Path) -> None:
    run_ranks(2, train_and_write, tmp_path, folder=tmp_path)
    assert_same(loaded(tmp_path / "masters"), loaded(tmp_path / "model"))
    bias = loaded(tmp_path / "model")["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert set((bias.abs() * 100).round().tolist()) <= {0.0, 1.0, 2.0} and bias.any()


def refused_on_rank(folder: Path) -> str:
    return refusal(lambda: alfb_dist.from_pretrained(folder, ep_degree=2))


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_wrong_tensors_are_named_on_every_rank(tmp_path: Path, damage: str) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        name = "model.layers.1.mlp.experts.8.up_proj.weight"
        tensors[name] = torch.zeros(16, 24)
    else:
        tensors[name] = torch.zeros(16, 23)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    messages = run_ranks(2, refused_on_rank, tmp_path, folder=tmp_path)
    assert name in messages[0] and messages[0] == messages[1]


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pickled" in refusal(lambda: alfb_dist.from_pretrained(tmp_path, ep_degree=1))


def test_rounded_bias_brings_a_warning(tmp_path: Path) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = tensors[name].bfloat16().float()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="rounded to 16 bits"):
        alfb_dist.from_pretrained(tmp_path, ep_degree=1)


def test_block_fp8_is_dequantised(tmp_path: Path) -> None:
    """Blocks of 16 x 16; each value is its 8-bit number times the scale of its block, taken one by one."""
    write(tmp_path)
    tensors, expected = load_file(tmp_path / "model.safetensors"), {}
    for name in [n for n in tensors if ".experts.3." in n]:
        weight = tensors[name]
        scale = 0.25 + torch.rand(-(-weight.shape[0] // 16), -(-weight.shape[1] // 16))
        tensors[name], tensors[f"{name}_scale_inv"] = weight.to(torch.float8_e4m3fn), scale
        expected[name] = torch.tensor(
            [
                [float(tensors[name][i, j].float() * scale[i // 16, j // 16]) for j in range(weight.shape[1])]
                for i in range(weight.shape[0])
            ]
        )
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = alfb_dist.from_pretrained(tmp_path, ep_degree=1, dtype="float32").state_dict()
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.experts"
        gate_up = [expected[f"{name}.3.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(found[f"{name}.gate_up_proj"][3], torch.cat(gate_up))
        assert torch.equal(found[f"{name}.down_proj"][3], expected[f"{name}.3.down_proj.weight"])


def read_share(folder: Path) -> tuple[int, int]:
    """(bytes of the model on this rank, bytes of tensors that it read)."""
    with opened_readers() as opened:
        model = alfb_dist.from_pretrained(folder, ep_degree=2)
    return sum(x.numel() * x.element_size() for x in model.state_dict().values()), opened[0].bytes_read


@pytest.mark.parametrize("hub", [True, False])
def test_rank_reads_its_share_and_no_more(tmp_path: Path, hub: bool) -> None:
    whole = sum(x.numel() * x.element_size() for x in write(tmp_path, hub=hub).values())
    for share, read in run_ranks(2, read_share, tmp_path, folder=tmp_path):
        assert share < 0.75 * whole and read == share


def train_save_and_write(folder: Path) -> None:
    from alfb_dist import checkpoint

    engine, balancer = make(1, 2)
    train(engine, balancer, 1, 2)
    checkpoint.save(engine, balancer, folder / "checkpoints", step=2, state={})
    alfb_dist.save_pretrained(engine, folder / "engine")


def test_export_of_a_checkpoint_equals_that_of_its_engine(tmp_path: Path) -> None:
    run_ranks(2, train_save_and_write, tmp_path, folder=tmp_path)
    to_hf(tmp_path / "checkpoints" / "step-00000002", tmp_path / "checkpoint", tiny_model().config)
    name = "model.safetensors"
    assert (tmp_path / "checkpoint" / name).read_bytes() == (tmp_path / "engine" / name).read_bytes()
    assert_same(loaded(tmp_path / "checkpoint"), loaded(tmp_path / "engine"))
    config = tiny_model().config.to_dict()
    model = {"path": "", "family": config.pop("model_type"), "dtype": "float32", "config": config}
    (tmp_path / "config.json").write_text(json.dumps({"config": {"model": model}}))
    save = tmp_path / "checkpoints" / "step-00000002"
    assert main(["checkpoint", "to-hf", str(save), str(tmp_path / "command")]) == 0
    assert (tmp_path / "command" / name).read_bytes() == (tmp_path / "engine" / name).read_bytes()


def save_mixtral(folder: Path) -> None:
    from alfb_dist import checkpoint

    optimizer = {"type": "SGD", "params": {"lr": 0.1}}
    ds_config = {"train_micro_batch_size_per_gpu": 1, "optimizer": optimizer}
    engine, balancer = alfb_dist.initialize(mixtral(), ds_config, ep_degree=2)
    checkpoint.save(engine, balancer, folder, step=1, state={})
    engine.module.model.layers[1].mlp.gate.selection_bias.fill_(0.1)
    checkpoint.save(engine, balancer, folder, step=2, state={})


def test_a_checkpoints_bias_without_a_place_is_refused_unless_it_says_nothing(tmp_path: Path) -> None:
    run_ranks(2, save_mixtral, tmp_path, folder=tmp_path)
    config = mixtral().config
    to_hf(tmp_path / "step-00000001", tmp_path / "a", config)
    assert "has no place" in refusal(lambda: to_hf(tmp_path / "step-00000002", tmp_path / "b", config))
    assert not (tmp_path / "b").exists()


def test_bias_without_a_place_is_refused_or_goes_beside(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "a")
    model = alfb_dist.from_pretrained(tmp_path / "a", ep_degree=1)
    alfb_dist.save_pretrained(model, tmp_path / "zero")  # biases of 0 say nothing
    model.model.layers[1].mlp.gate.selection_bias.fill_(0.1)
    assert "no place" in refusal(lambda: alfb_dist.save_pretrained(model, tmp_path / "b"))
    with pytest.warns(UserWarning, match="routes without"):
        alfb_dist.save_pretrained(model, tmp_path / "b", bias_sidecar=True)
    assert_same(alfb_dist.from_pretrained(tmp_path / "b", ep_degree=1).state_dict(), model.state_dict())
