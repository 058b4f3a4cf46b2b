"""Exports of engines at every ZeRO stage and type, and the files left after a failure."""

from __future__ import annotations

import errno
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.checkpoint_runs import make, refusal, train
from support.hub_folders import loaded, opened_readers
from support.ranks import run_ranks
from support.tiny import tiny_model

import alfb_dist
from alfb_dist import checkpoint
from alfb_dist.checkpoint import files, safetensors_reader
from alfb_dist.cli import main
from alfb_dist.pretrained import from_hf, to_hf

ENGINES = [(0, False), (0, True), (1, True), (2, False), (2, True)]
"""(ZeRO stage, whether bfloat16)."""


def write_engines(folder: Path) -> None:
    for stage, bf16 in ENGINES:
        engine, balancer = make(stage, 2, bf16=bf16, tie_word_embeddings=stage == 1)
        train(engine, balancer, 1, 2)
        here = folder / f"{stage}-{bf16}"
        checkpoint.save(engine, balancer, here / "checkpoints", step=2, state={})
        alfb_dist.save_pretrained(engine, here / "model")
        alfb_dist.save_pretrained(engine, here / "masters", masters=True)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with checkpoints and both exports of each of ENGINES."""
    folder = tmp_path_factory.mktemp("engines")
    run_ranks(2, write_engines, folder, folder=folder)
    return folder


@pytest.mark.parametrize(("stage", "bf16"), ENGINES)
def test_masters_are_those_of_the_checkpoint_and_the_model_is_these_rounded(
    engines: Path, tmp_path: Path, stage: int, bf16: bool
) -> None:
    here = engines / f"{stage}-{bf16}"
    config = tiny_model(tie_word_embeddings=stage == 1).config
    to_hf(here / "checkpoints" / "step-00000002", tmp_path / "out", config)
    masters, model = loaded(here / "masters"), loaded(here / "model")
    name = "model.safetensors"
    assert (here / "masters" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    dtype = torch.bfloat16 if bf16 else torch.float32
    to_hf(here / "checkpoints" / "step-00000002", tmp_path / "rounded", config, dtype=dtype)
    assert (here / "model" / name).read_bytes() == (tmp_path / "rounded" / name).read_bytes()
    assert ("lm_head.weight" in load_file(here / "masters" / name)) == (stage != 1)
    for key, x in masters.items():
        bias = key.endswith("e_score_correction_bias")
        assert x.dtype == torch.float32
        expected = x if bias or not bf16 else x.bfloat16()
        assert model[key].dtype == expected.dtype and torch.equal(model[key], expected), key
    bias = masters["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert set((bias.abs() * 100).round().tolist()) <= {0.0, 1.0, 2.0}, "two steps of rate 0.01"
    assert bias.any() and (not bf16 or not torch.equal(bias, bias.bfloat16().float()))


def test_to_hf_reads_the_configuration_of_the_run(engines: Path, tmp_path: Path) -> None:
    here, config = engines / "2-False", tiny_model().config.to_dict()
    model = {"path": "", "family": config.pop("model_type"), "dtype": "float32", "config": config}
    (here / "config.json").write_text(json.dumps({"config": {"model": model}}))
    assert main(["checkpoint", "to-hf", str(here / "checkpoints" / "step-00000002"), str(tmp_path / "out")]) == 0
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (here / "model" / name).read_bytes()


def test_fused_8_bit_weights_are_dequantised_and_written_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 16 x 16 of every expert; each value is its number times the scale of its block, computed one by one."""
    tiny_model(3).save_pretrained(tmp_path / "in", save_original_format=False)
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    weight = tensors[name].to(torch.float8_e4m3fn)
    scale = 0.25 + torch.rand(8, 2, 2)
    tensors[name], tensors[f"{name}_scale_inv"] = weight, scale
    expected = torch.empty(8, 32, 24)
    for e in range(8):
        for i in range(32):
            for j in range(24):
                expected[e, i, j] = weight[e, i, j].float() * scale[e, i // 16, j // 16]
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}, "dtype": "bfloat16"}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(safetensors_reader, "BLOCK_BYTES", 1000)  # so that an expert is read at a time
    found = alfb_dist.from_pretrained(tmp_path / "in", ep_degree=1, dtype="float32").state_dict()[name]
    save = from_hf(tmp_path / "in", tmp_path / "run")
    assert torch.equal(found, expected)
    to_hf(save, tmp_path / "out", tiny_model().config)
    assert torch.equal(loaded(tmp_path / "out")[name], expected)


def full_after(limit: int) -> None:
    """Make this process's disk full after `limit` bytes."""
    inner, written = files.write, [0]

    def write(file: Any, data: Any) -> None:
        written[0] += memoryview(data).nbytes
        if written[0] > limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        inner(file, data)

    files.write = write


def export_onto_full_disk(folder: Path) -> list[str]:
    model = alfb_dist.from_pretrained(folder / "in", ep_degree=2)
    if dist.get_rank() == 1:
        full_after(40_000)

    def attempt(name: str) -> None:
        alfb_dist.save_pretrained(model, folder / name, max_shard_bytes=30_000, overwrite=True)

    return [refusal(partial(attempt, name), OSError) for name in ("new", "old")]


def test_full_disk_on_one_rank_is_named_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    for name in ("in", "old"):
        tiny_model(3).save_pretrained(tmp_path / name)
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}
    first, second = run_ranks(2, export_onto_full_disk, tmp_path, folder=tmp_path)
    assert first == second and all("No space left" in m and ".safetensors" in m and "rank 1" in m for m in first)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("ranks")) == ["in", "old"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before


def test_full_disk_leaves_nothing_of_a_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(3).save_pretrained(tmp_path / "in")
    save = from_hf(tmp_path / "in", tmp_path / "run")
    monkeypatch.setattr(files, "write", files.write)  # restored at the end
    for limit in (100, 50_000):
        full_after(limit)
        assert "No space left" in refusal(lambda: to_hf(save, tmp_path / "x", tiny_model().config), OSError)
        assert "No space left" in refusal(lambda: from_hf(tmp_path / "in", tmp_path / "run2"), OSError)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "run"]


def refused_sizes(folder: Path) -> tuple[str, int]:
    """Return the refusal, and the bytes of tensors that were read before it."""
    with opened_readers() as opened:
        message = refusal(lambda: alfb_dist.from_pretrained(folder, ep_degree=2))
    return message, sum(reader.bytes_read for reader in opened)


def test_indivisible_sizes_are_refused_before_a_tensor_is_read(tmp_path: Path) -> None:
    tiny_model(3, n_routed_experts=7).save_pretrained(tmp_path / "in")
    for message, read in run_ranks(2, refused_sizes, tmp_path / "in", folder=tmp_path):
        assert "num_experts (7)" in message and "ep_degree (2)" in message and read == 0
