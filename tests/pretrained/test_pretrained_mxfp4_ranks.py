"""gpt-oss as published, with experts packed in 4 bits, is read on two ranks as the numbers that they encode."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_runs import refusal
from support.ranks import run_ranks
from support.tiny_families import batch, family_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import alfb_dist
from alfb_dist.pretrained import describe_folder, from_hf, relayout

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""The values of the last three of four bits; the first is the sign."""
NAME = "model.layers.1.mlp.experts.gate_up_proj"


def published(folder: Path, seed: int = 3) -> dict[str, Tensor]:
    """Write a directory in the form of the release; return the tensors of its model, unpacked number by number."""
    model: Any = family_model("gpt_oss", seed, hidden_size=32, intermediate_size=32, num_local_experts=4, head_dim=16)
    model.save_pretrained(folder)
    expected = load_file(folder / "model.safetensors")
    stored, generator = dict(expected), torch.Generator().manual_seed(seed)
    for name in [n for n in stored if n.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, columns, rows = stored.pop(name).shape
        shape = (num_experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(110, 125, shape, generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        for e, row, column in torch.cartesian_prod(*map(torch.arange, (num_experts, rows, columns))).tolist():
            block, place = divmod(column, 32)
            bits = int(blocks[e, row, block, place // 2]) >> (4 * (place % 2)) & 15
            value = VALUES[bits & 7] * (-1) ** (bits >> 3) * 2.0 ** (int(scales[e, row, block]) - 127)
            expected[name][e, column, row] = value
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def read_and_write(folder: Path) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    model = alfb_dist.from_pretrained(folder / "in", ep_degree=2, dtype="float32")
    alfb_dist.save_pretrained(model, folder / "out")
    return {"logits": model(input_ids=batch(1)["input_ids"]).logits.detach(), **model.state_dict()}


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], list[dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("gpt-oss")
    expected = published(folder / "in")
    return folder, expected, run_ranks(2, read_and_write, folder, folder=folder)


def test_each_rank_reads_its_experts_as_the_numbers_encoded(read: Any) -> None:
    _, expected, by_rank = read
    for rank, found in enumerate(by_rank):
        for name, x in expected.items():
            mine = x.chunk(2)[rank] if ".experts." in name else x
            assert found[name].dtype == torch.float32 and torch.equal(found[name], mine), name
    assert expected[NAME].unique().numel() > 40


def test_written_model_equals_the_one_that_transformers_unpacks(read: Any) -> None:
    folder, expected, by_rank = read
    eager = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(folder / "in", **eager).eval()
    again = AutoModelForCausalLM.from_pretrained(folder / "out", **eager).eval()
    assert "quantization_config" not in json.loads((folder / "out" / "config.json").read_text())
    for name, x in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], x) and torch.equal(x, expected[name]), name
    with torch.no_grad():
        logits = [model(input_ids=batch(1)["input_ids"]).logits for model in (theirs, again)]
    assert torch.equal(*logits)
    assert all(torch.allclose(found["logits"], logits[0], rtol=1e-4, atol=1e-4) for found in by_rank)


def test_conversions_read_it(read: Any, tmp_path: Path) -> None:
    folder, expected, _ = read
    assert describe_folder(folder / "in")["layout"] == "fused"
    relayout(folder / "in", tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[NAME], expected[NAME])
    save = from_hf(folder / "in", tmp_path / "run")
    stored = {name: x for path in save.glob("tensors*.safetensors") for name, x in load_file(path).items()}
    assert all(torch.equal(stored[f"weight/{NAME}/{e}"], expected[NAME][e]) for e in range(4))


@pytest.mark.parametrize(
    ("end", "change", "text"),
    [
        ("_scales", None, "its scales .* are missing"),
        ("_blocks", None, "lacks .*gate_up_proj"),
        ("_scales", lambda x: x[:, 1:].contiguous(), "must be"),
        ("_blocks", lambda x: x.float(), "must be"),
    ],
)
def test_packed_tensors_that_do_not_match_are_refused(tmp_path: Path, end: str, change: Any, text: str) -> None:
    published(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    packed = tensors.pop(f"{NAME}{end}")
    if change is not None:
        tensors[f"{NAME}{end}"] = change(packed)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=text):
        alfb_dist.from_pretrained(tmp_path, ep_degree=1)
    assert NAME in refusal(lambda: alfb_dist.from_pretrained(tmp_path, ep_degree=1))
