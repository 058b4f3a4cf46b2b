"""Every distinct layout of transformers' families is read and written: the same tensors, and logits to the last bit."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_runs import refusal
from support.ranks import run_ranks
from support.tiny import VOCAB, random_biases, tiny_batch, tiny_config
from support.tiny import set_biases as set_tiny_biases
from support.tiny_families import batch, biases, family_config, family_model, set_biases
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3ForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
)

import alfb_dist
from alfb_dist import Balancer, parallelize
from alfb_dist.pretrained import describe_folder, from_hf, relayout, to_hf
from alfb_dist.pretrained.logits import read_folder

FAMILIES = {
    "aria_text": "no bias, experts transposed, fused under other names, a gate named router",
    "cohere2_moe": "no bias, tied embeddings",
    "deepseek_v3": "bias in the gate, experts gate_proj, up_proj, down_proj",
    "deepseek_v4": "a table of ids among the buffers, layers whose experts are not sharded, names by patterns",
    "ernie4_5_moe": "bias (1, E) in a part of the gate, tied embeddings",
    "gemma4_text": "no bias, gate and experts in the layer next to its MLP, a scale of each expert, buffers of layers",
    "gpt_oss": "no bias, experts with biases",
    "granitemoe": "no bias, fused under other names",
    "kimi_linear": "convolutions concatenated of three tensors",
    "lfm2_moe": "bias in the block, tied embeddings",
    "llama4_text": "no bias, another name of the whole model",
    "longcat_flash": "rows that belong to no expert",
    "minimax_m2": "bias in the block, experts w1, w2, w3 under another name",
    "nemotron_h": "experts without a gate projection, another name of the whole model",
    "qwen3_moe": "no bias, experts gate_proj, up_proj, down_proj",
}
FUSED = {"cohere2_moe", "deepseek_v3", "ernie4_5_moe", "lfm2_moe", "minimax_m2"}
"""Families whose source is fused; the others are under the names of their releases."""
INTERLEAVED = "inkling2_text"
"""A family whose single experts have rows in another order: refused, or written fused."""


def export(folder: Path, families: list[str], ep_degree: int) -> None:
    warnings.simplefilter("ignore")
    for family in families:
        model = alfb_dist.from_pretrained(folder / family / "source", ep_degree=ep_degree)
        for layout in ("auto", "fused"):
            alfb_dist.save_pretrained(model, folder / family / layout, layout=layout, max_shard_bytes=60_000)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of FAMILIES, written by transformers, read on two ranks and written again."""
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        model: Any = family_model(family, 3)
        set_biases(model, 5)
        model.save_pretrained(folder / family / "source", save_original_format=family not in FUSED)
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
    """The original is in torch's own memory, the exported one in mapped files."""
    original: Any = family_model(family, 3).eval()
    set_biases(original, 5)
    again = read(exported / family / layout)
    expected, found = original.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        rows = 8 if family == "longcat_flash" and ".experts." in name else len(x)  # the others are not read
        assert found[name].dtype == x.dtype and torch.equal(found[name][:rows], x[:rows]), name
        assert not found[name][rows:].any()
    assert torch.equal(logits(again), logits(original))


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_converted_from_a_directory_is_exported_as_the_model_itself(
    exported: Path, tmp_path: Path, family: str
) -> None:
    save = from_hf(exported / family / "source", tmp_path / "run")
    config = AutoConfig.from_pretrained(exported / family / "source")
    to_hf(save, tmp_path / "out", config, max_shard_bytes=60_000)
    expected = {p.name: p.read_bytes() for p in (exported / family / "auto").glob("*.safetensors*")}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.safetensors*")} == expected


def entries(folder: Path) -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, first byte in the file, bytes, bytes of an element) of every tensor of a directory."""
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, found in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = found["data_offsets"]
                yield name, 8 + length + start, end - start, {"F32": 4, "I64": 8}[found["dtype"]]


def test_tensors_are_aligned(exported: Path) -> None:
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
    assert "use layout 'fused'" in refusal(lambda: alfb_dist.save_pretrained(found, tmp_path / "x"))
    alfb_dist.save_pretrained(found, tmp_path / "out", layout="fused")
    assert torch.equal(logits(read(tmp_path / "out")), logits(model.eval()))


def test_directory_needs_no_names_for_rows_that_belong_to_no_expert(tmp_path: Path) -> None:
    """As on the hub, which has only the experts with weights."""
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


ADDED = ["aria_text", "gemma4_text", "gpt_oss", "granitemoe", "llama4_text", "qwen3_moe"]
RELEASED = {"aria_text": "mlp.experts.fc1.weight", "granitemoe": "block_sparse_moe.input_linear.weight"}


@pytest.mark.parametrize("family", RELEASED)
def test_names_of_releases_are_read_and_written(exported: Path, family: str) -> None:
    for form in ("source", "auto"):
        names = {name for name, *_ in entries(exported / family / form)}
        assert f"model.layers.1.{RELEASED[family]}" in names and not any("gate_up_proj" in name for name in names)


def bias_names(model: Any) -> list[str]:
    return [name for name in model.state_dict() if name.endswith("selection_bias")]


def add_biases(folder: Path) -> dict[str, tuple[list[str], list[Tensor], Tensor]]:
    """Return names and values of each family's added biases, and its logits, after they were written and read."""
    warnings.simplefilter("ignore")
    seen = {}
    for family in ADDED:
        model = alfb_dist.from_pretrained(folder / family / "fused", ep_degree=2)
        set_biases(model, 6)
        assert "no place" in refusal(partial(alfb_dist.save_pretrained, model, folder / family / "x"))
        alfb_dist.save_pretrained(model, folder / family / "biased", bias_sidecar=True)
        again = alfb_dist.from_pretrained(folder / family / "biased", ep_degree=2)
        seen[family] = bias_names(again), biases(again), logits(again)
        assert torch.equal(logits(model), logits(again))
    return seen


def test_added_biases_pass_through_their_sidecar_in_float32(exported: Path) -> None:
    for by_family in run_ranks(2, add_biases, exported, folder=exported):
        for family, (names, found, seen) in by_family.items():
            expected = parallelize(family_model(family, 3), ep_degree=1).eval()
            set_biases(expected, 6)
            stored = load_file(exported / family / "biased" / "alfb_bias.safetensors")
            assert list(stored) == names == bias_names(expected) and len(names) > 0
            for name, bias, kept in zip(names, biases(expected), found, strict=True):
                assert bias.any() and torch.equal(stored[name], bias) and stored[name].dtype == torch.float32
                assert torch.equal(kept, bias) and kept.dtype == torch.float32
            assert torch.allclose(seen, logits(expected), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(seen, logits(family_model(family, 3).eval()), rtol=1e-3, atol=1e-3), family
            assert torch.equal(logits(read(exported / family / "biased")), logits(family_model(family, 3).eval()))


@pytest.mark.parametrize("family", ["granitemoe", "mixtral"])
def test_added_biases_are_read_where_transformers_saves_them(tmp_path: Path, family: str) -> None:
    """As its Trainer saves a model that BalanceCallback balanced; mixtral's have another name in files."""
    model: Any = family_model(family, 3)
    expected = Balancer(model).gates
    set_biases(model, 6)
    model.save_pretrained(tmp_path / "in")
    found = alfb_dist.from_pretrained(tmp_path / "in", ep_degree=1)
    assert len(expected) == len(biases(found)) == 2
    for gate, bias in zip(expected, biases(found), strict=True):
        assert torch.equal(bias, gate.bias_E) and bias.dtype == torch.float32
    relayout(tmp_path / "in", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "alfb_bias.safetensors")
    assert list(stored) == bias_names(found) and all(torch.equal(x, found.state_dict()[n]) for n, x in stored.items())
    save = load_file(next(from_hf(tmp_path / "in", tmp_path / "run").glob("balance*.safetensors")))
    assert all(torch.equal(save[f"bias/{name}"], x) for name, x in stored.items())
    assert all("not rounded" in describe_folder(tmp_path / "in")[name] for name in stored)
    assert torch.equal(logits(read_folder(tmp_path / "in")), logits(found))


def test_language_model_of_a_multimodal_release_is_read_and_written_alone(tmp_path: Path) -> None:
    """As transformers' causal language model reads Llama 4, whose directory has the tensors of three parts."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 16}
    sizes |= {"projector_input_dim": 16, "projector_output_dim": 16}
    text = family_config("llama4_text")
    Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=sizes)).save_pretrained(tmp_path / "in")
    found, expected = alfb_dist.from_pretrained(tmp_path / "in", ep_degree=1), read(tmp_path / "in")
    assert all(torch.equal(found.state_dict()[name], x) for name, x in expected.state_dict().items())
    alfb_dist.save_pretrained(found, tmp_path / "out")
    assert torch.equal(logits(read(tmp_path / "out")), logits(expected))
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    save_file(tensors | {"language_model.x": torch.ones(1)}, tmp_path / "in" / "model.safetensors")
    assert "unknown language_model.x" in refusal(lambda: alfb_dist.from_pretrained(tmp_path / "in", ep_degree=1))


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
"""The differences from DeepSeek-V3 in their config.json."""
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
    """Write a directory in the form of a model on the hub, with its own code; return the model."""
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
        (folder / file).write_text("raise SystemExit('the code in the directory was run')\n")
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('the code in the directory was run')\n")
    (folder / "tiktoken.model").write_text("")
    return model


def read_and_write(folder: Path) -> Tensor:
    model = alfb_dist.from_pretrained(folder / "hub", ep_degree=2)
    alfb_dist.save_pretrained(model, folder / "out")
    with torch.no_grad():
        found: Tensor = model(input_ids=tiny_batch(1, 2, 6)["input_ids"]).logits
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_and_written(tmp_path: Path, name: str) -> None:
    model = published(tmp_path / "hub", name)
    with torch.no_grad():
        expected = model(input_ids=tiny_batch(1, 2, 6)["input_ids"]).logits
    for found in run_ranks(2, read_and_write, tmp_path, folder=tmp_path):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for key, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], x), key
    assert again.config.routed_scaling_factor == PUBLISHED[name]["routed_scaling_factor"]
    assert again.config.topk_method == "noaux_tc" and (tmp_path / "out" / "tiktoken.model").is_file()
    with torch.no_grad():
        assert torch.equal(again(input_ids=tiny_batch(1, 2, 6)["input_ids"]).logits, expected)


def test_own_code_of_another_model_is_not_run_and_its_type_is_named(tmp_path: Path) -> None:
    published(tmp_path, "Kimi K2")
    values = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["KimiForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert "kimi_k2" in refusal(lambda: alfb_dist.from_pretrained(tmp_path, ep_degree=1))
