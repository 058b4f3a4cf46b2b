"""Every distinct layout of transformers' families goes in and out: the same tensors, and logits to the last bit."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import refusal
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import VOCAB, random_biases, tiny_batch, tiny_config
from tiny import set_biases as set_tiny_biases
from tiny_families import batch, family_model, set_biases
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3ForCausalLM

import alfb_dist
from alfb_dist.pretrained import from_hf, to_hf

FAMILIES = {
    "deepseek_v3": "bias in the gate, experts gate_proj, up_proj, down_proj",
    "deepseek_v4": "a table of ids among the buffers, layers whose experts stay whole, names by patterns",
    "ernie4_5_moe": "bias (1, E) in a part of the gate, tied embeddings",
    "kimi_linear": "convolutions joined of three tensors",
    "lfm2_moe": "bias in the block, tied embeddings",
    "longcat_flash": "rows that belong to no expert",
    "minimax_m2": "bias in the block, experts w1, w2, w3 under another name",
    "nemotron_h": "experts without a gate projection, another name of the whole model",
    "qwen3_moe": "no bias",
}
INTERLEAVED = "inkling2_text"
"""A family whose names for single experts hold rows in another order: refused, or written fused."""


def export(folder: Path, families: list[str], ep_degree: int) -> None:
    warnings.simplefilter("ignore")
    for family in families:
        model = alfb_dist.from_pretrained(folder / family / "source", ep_degree=ep_degree)
        for layout in ("auto", "fused"):
            alfb_dist.save_pretrained(model, folder / family / layout, layout=layout, max_shard_bytes=60_000)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAMILIES, written by transformers, read on two ranks and written again."""
    folder = tmp_path_factory.mktemp("families")
    for i, family in enumerate(FAMILIES):
        model: Any = family_model(family, 3)
        set_biases(model, 5)
        model.save_pretrained(folder / family / "source", save_original_format=bool(i % 2))
    run_ranks(2, export, folder, list(FAMILIES), 2, folder=folder)
    return folder


def read(folder: Path) -> Any:
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **eager).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=batch(1)["input_ids"]).logits
    return found


@pytest.mark.parametrize("layout", ["auto", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_model_is_the_same_and_computes_the_same_bits(exported: Path, family: str, layout: str) -> None:
    """The original is in torch's own memory, the exported one where its files are mapped."""
    original: Any = family_model(family, 3).eval()
    set_biases(original, 5)
    again = read(exported / family / layout)
    expected, found = original.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        rows = 8 if family == "longcat_flash" and ".experts." in name else len(x)  # the others are never read
        assert found[name].dtype == x.dtype and torch.equal(found[name][:rows], x[:rows]), name
        assert not found[name][rows:].any()
    assert torch.equal(logits(again), logits(original))


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_made_of_a_folder_is_written_as_the_model_itself(
    exported: Path, tmp_path: Path, family: str
) -> None:
    save = from_hf(exported / family / "source", tmp_path / "run")
    config = AutoConfig.from_pretrained(exported / family / "source")
    to_hf(save, tmp_path / "out", config, max_shard_bytes=60_000)
    expected = {p.name: p.read_bytes() for p in (exported / family / "auto").glob("*.safetensors*")}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.safetensors*")} == expected


def entries(folder: Path) -> Iterator[tuple[str, int, int, int]]:
    """(name, first byte in the file, bytes, bytes of an element) of every tensor of a folder."""
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, found in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = found["data_offsets"]
                yield name, 8 + length + start, end - start, {"F32": 4, "I64": 8}[found["dtype"]]


def test_tensors_lie_aligned(exported: Path) -> None:
    for family in FAMILIES:
        for name, start, size, width in entries(exported / family / "fused"):
            assert start % (64 if size % 64 == 0 else width) == 0, name


def test_interleaved_experts_are_refused_by_name_and_written_fused(tmp_path: Path) -> None:
    model: Any = family_model(INTERLEAVED, 3)
    set_biases(model, 5)
    for hub in (True, False):
        model.save_pretrained(tmp_path / f"{hub}", save_original_format=hub)
    assert "not supported" in refusal(lambda: alfb_dist.from_pretrained(tmp_path / "True", ep_degree=1))
    found = alfb_dist.from_pretrained(tmp_path / "False", ep_degree=1)
    assert "layout 'fused' is" in refusal(lambda: alfb_dist.save_pretrained(found, tmp_path / "x"))
    alfb_dist.save_pretrained(found, tmp_path / "out", layout="fused")
    assert torch.equal(logits(read(tmp_path / "out")), logits(model.eval()))


def test_folder_needs_no_names_for_rows_that_belong_to_no_expert(tmp_path: Path) -> None:
    """As on the hub, where only the experts with weights are."""
    model: Any = family_model("longcat_flash", 3)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {n: x for n, x in tensors.items() if not any(f".experts.{e}." in n for e in range(8, 12))}
    assert len(kept) == len(tensors) - 4 * 2
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = alfb_dist.from_pretrained(tmp_path, ep_degree=1).state_dict()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(found[name], model.state_dict()[name][:8])
    del kept["model.layers.0.mlp.experts.7.up_proj.weight"]
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "experts.7.up_proj" in refusal(lambda: alfb_dist.from_pretrained(tmp_path, ep_degree=1))


PUBLISHED: dict[str, dict[str, Any]] = {
    "Moonlight": {
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "n_shared_experts": 2,
        "rope_theta": 50000.0,
        "rope_scaling": None,
    },
    "Kimi K2": {
        "model_type": "kimi_k2",
        "q_lora_rank": 16,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "n_shared_experts": 1,
        "rope_theta": 50000.0,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 32,
            "type": "yarn",
        },
    },
}
"""What sets them apart from DeepSeek-V3, as their config.json say it."""
EXTRA_KEYS: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
}


def published(folder: Path, name: str) -> DeepseekV3ForCausalLM:
    """A folder in the form in which a model is on the hub, its code beside it; the model."""
    values = {k: v for k, v in tiny_config().to_diff_dict().items() if k not in ("qk_head_dim", "head_dim", "dtype")}
    values |= {"vocab_size": VOCAB, "max_position_embeddings": 1024, **EXTRA_KEYS, **PUBLISHED[name]}
    plain = {k: v for k, v in values.items() if k not in ("model_type", "auto_map")}
    config = AutoConfig.for_model("deepseek_v3", **plain)
    torch.manual_seed(3)
    model = DeepseekV3ForCausalLM(config).eval()
    set_tiny_biases(model, random_biases(model, 4) + 8)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    for file in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (folder / file).write_text("raise SystemExit('the code of a folder was run')\n")
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('the code of a folder was run')\n")
    (folder / "tiktoken.model").write_text("")
    return model


def go_round(folder: Path) -> Tensor:
    model = alfb_dist.from_pretrained(folder / "hub", ep_degree=2)
    alfb_dist.save_pretrained(model, folder / "out")
    with torch.no_grad():
        found: Tensor = model(input_ids=tiny_batch(1, 2, 6)["input_ids"]).logits
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_go_in_and_out(tmp_path: Path, name: str) -> None:
    model = published(tmp_path / "hub", name)
    with torch.no_grad():
        expected = model(input_ids=tiny_batch(1, 2, 6)["input_ids"]).logits
    for found in run_ranks(2, go_round, tmp_path, folder=tmp_path):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for key, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], x), key
    assert again.config.routed_scaling_factor == PUBLISHED[name]["routed_scaling_factor"]
    assert again.config.topk_method == "noaux_tc" and (tmp_path / "out" / "tiktoken.model").is_file()
    with torch.no_grad():
        assert torch.equal(again(input_ids=tiny_batch(1, 2, 6)["input_ids"]).logits, expected)


def test_other_models_code_is_not_run_and_the_family_named(tmp_path: Path) -> None:
    published(tmp_path, "Kimi K2")
    values = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["KimiForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert "kimi_k2" in refusal(lambda: alfb_dist.from_pretrained(tmp_path, ep_degree=1))
