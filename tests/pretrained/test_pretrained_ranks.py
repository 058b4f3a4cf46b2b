"""A transformers directory read on ranks and written again has the same weights, files and biases, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_runs import refusal
from support.hub_folders import assert_same, loaded, mixtral, opened_readers
from support.ranks import run_ranks
from support.tiny import random_biases, set_biases, tiny_model
from torch import Tensor

import alfb_dist
from alfb_dist.pretrained import to_hf


def write(folder: Path, *, hub: bool = True, size: str = "5GB") -> dict[str, Tensor]:
    """Write a tiny model with biases by transformers; return its state dict."""
    model = tiny_model(3)
    set_biases(model, random_biases(model, 5))
    model.save_pretrained(folder, save_original_format=hub, max_shard_size=size)
    (folder / "tokenizer.json").write_text("{}")
    return {name: x.clone() for name, x in model.state_dict().items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_and_write(folder: Path, ep_degree: int) -> None:
    for layout in ("per_expert", "fused"):
        model = alfb_dist.from_pretrained(folder / layout / "source", ep_degree=ep_degree)
        alfb_dist.save_pretrained(model, folder / layout / f"{ep_degree}", layout=layout, max_shard_bytes=20_000)


def test_round_trip_is_exact_and_files_equal_for_ep_1_2_4(tmp_path: Path) -> None:
    for layout in ("per_expert", "fused"):
        expected = write(tmp_path / layout / "source", hub=layout == "fused", size="20KB")
    for world in (1, 2, 4):
        run_ranks(world, read_and_write, tmp_path, world, folder=tmp_path)
    for layout in ("per_expert", "fused"):
        one, two, four = (contents(tmp_path / layout / f"{world}") for world in (1, 2, 4))
        assert_same(loaded(tmp_path / layout / "4"), expected)
        assert one == two == four and "tokenizer.json" in one


def test_bfloat16_reads_as_transformers_does_and_bias_stays_float32(tmp_path: Path) -> None:
    expected = write(tmp_path)
    found = alfb_dist.from_pretrained(tmp_path, ep_degree=1, dtype=torch.bfloat16).state_dict()
    assert_same(found, loaded(tmp_path, dtype=torch.bfloat16))
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert found[bias].dtype == torch.float32 and torch.equal(found[bias], expected[bias])


DAMAGES = ("missing", "unknown", "shape")


def refused_on_rank(folder: Path) -> list[str]:
    return [refusal(lambda d=d: alfb_dist.from_pretrained(folder / d, ep_degree=2)) for d in DAMAGES]  # type: ignore[misc]


def test_wrong_tensors_are_named_on_every_rank(tmp_path: Path) -> None:
    names = []
    for damage in DAMAGES:
        write(tmp_path / damage)
        path = tmp_path / damage / "model.safetensors"
        tensors, expert = load_file(path), 8 if damage == "unknown" else 5
        names.append(f"model.layers.1.mlp.experts.{expert}.up_proj.weight")
        tensors[names[-1]] = torch.zeros(16, 23 if damage == "shape" else 24)
        if damage == "missing":
            del tensors[names[-1]]
        save_file(tensors, path, metadata={"format": "pt"})
    first, second = run_ranks(2, refused_on_rank, tmp_path, folder=tmp_path)
    assert first == second
    assert all(name in message for name, message in zip(names, first, strict=True))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pickled" in refusal(lambda: alfb_dist.from_pretrained(tmp_path, ep_degree=1))


def test_rounded_bias_raises_a_warning(tmp_path: Path) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = tensors[name].bfloat16().float()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="rounded to 16 bits"):
        alfb_dist.from_pretrained(tmp_path, ep_degree=1)


def test_block_fp8_is_dequantised(tmp_path: Path) -> None:
    """Blocks of 16 x 16; each value is its 8-bit number times the scale of its block, computed one by one."""
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


def read_shares(folder: Path) -> list[tuple[int, int]]:
    """Return (bytes of the model on this rank, bytes of tensors read) for each layout."""
    found = []
    for layout in ("per_expert", "fused"):
        with opened_readers() as opened:
            model = alfb_dist.from_pretrained(folder / layout, ep_degree=2)
        found.append((sum(x.numel() * x.element_size() for x in model.state_dict().values()), opened[0].bytes_read))
    return found


def test_rank_reads_its_share_and_no_more(tmp_path: Path) -> None:
    for layout in ("per_expert", "fused"):
        state = write(tmp_path / layout, hub=layout == "per_expert")
    whole = sum(x.numel() * x.element_size() for x in state.values())
    for by_layout in run_ranks(2, read_shares, tmp_path, folder=tmp_path):
        for share, read in by_layout:
            assert share < 0.75 * whole and read == share


def save_mixtral(folder: Path) -> None:
    from alfb_dist import checkpoint

    optimizer = {"type": "SGD", "params": {"lr": 0.1}}
    ds_config = {"train_micro_batch_size_per_gpu": 1, "optimizer": optimizer}
    engine, balancer = alfb_dist.initialize(mixtral(), ds_config, ep_degree=2)
    checkpoint.save(engine, balancer, folder, step=1, state={})
    engine.module.model.layers[1].mlp.gate.selection_bias.fill_(0.1)
    checkpoint.save(engine, balancer, folder, step=2, state={})


def test_a_checkpoints_bias_that_the_family_does_not_have_is_refused_unless_it_is_0(tmp_path: Path) -> None:
    run_ranks(2, save_mixtral, tmp_path, folder=tmp_path)
    config = mixtral().config
    to_hf(tmp_path / "step-00000001", tmp_path / "a", config)
    assert "has no place" in refusal(lambda: to_hf(tmp_path / "step-00000002", tmp_path / "b", config))
    assert not (tmp_path / "b").exists()


def test_bias_that_the_family_does_not_have_is_refused_or_written_to_a_sidecar(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "a")
    model = alfb_dist.from_pretrained(tmp_path / "a", ep_degree=1)
    alfb_dist.save_pretrained(model, tmp_path / "zero")  # biases of 0 change nothing
    model.model.layers[1].mlp.gate.selection_bias.fill_(0.1)
    assert "no place" in refusal(lambda: alfb_dist.save_pretrained(model, tmp_path / "b"))
    with pytest.warns(UserWarning, match="routes without"):
        alfb_dist.save_pretrained(model, tmp_path / "b", bias_sidecar=True)
    assert_same(alfb_dist.from_pretrained(tmp_path / "b", ep_degree=1).state_dict(), model.state_dict())
