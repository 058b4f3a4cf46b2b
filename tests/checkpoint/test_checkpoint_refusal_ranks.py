"""A save that is damaged or of another model is refused on every rank with one message before anything changes."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file
from support.checkpoint_runs import make, refusal, state_digests, train
from support.checkpoint_saves import accept, edit_manifest, flip, swap, swap_tensors
from support.ranks import run_ranks

import alfb_dist
from alfb_dist import checkpoint
from alfb_dist.checkpoint import manifest

FIRST, SECOND = "tensors-00000-000.safetensors", "tensors-00001-000.safetensors"
EXPERT = "model.layers.1.mlp.experts.down_proj"


class Bomb:
    """Makes a file when unpickled."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (self.canary,)


def _bomb(save: Path, name: str) -> None:
    (save / name).write_bytes(pickle.dumps(Bomb(str(save.parent / "canary"))))
    if name != "manifest.json":
        accept(save, name)


def _middle(path: Path) -> int:
    return 4 * path.stat().st_size


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "rank 0's tensors": (lambda p: flip(p / FIRST, _middle(p / FIRST)), FIRST),
    "rank 1's tensors": (lambda p: flip(p / SECOND, _middle(p / SECOND)), SECOND),
    "biases": (lambda p: flip(p / "balance.safetensors", _middle(p / "balance.safetensors")), "balance.safetensors"),
    "state": (lambda p: flip(p / "state.json", 99), "state.json"),
    "random state": (lambda p: flip(p / "rng-00001.json", 99), "rng-00001.json"),
    "manifest": (lambda p: flip(p / "manifest.json", 999), "manifest.json"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "the save is not finished"),
    "a missing file": (lambda p: (p / SECOND).unlink(), f"{SECOND} is missing"),
    "swapped files": (lambda p: swap(p / FIRST, p / SECOND), FIRST),
    "swapped experts": (lambda p: swap_tensors(p, f"weight/{EXPERT}/0", f"weight/{EXPERT}/1"), "fingerprints"),
    "another step": (
        lambda p: edit_manifest(p, lambda b: b.update(step=7)),
        "holds step 7",
    ),
    "a missing tensor": (
        lambda p: edit_manifest(p, lambda b: b["tensors"].pop("exp_avg/model.norm.weight")),
        "does not match the manifest",
    ),
    **{f"a pickle for {n}": (lambda p, n=n: _bomb(p, n), "") for n in (FIRST, "state.json", "manifest.json")},
}

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "more experts": (
        {"n_routed_experts": 12},
        "model.layers.1.mlp.experts has 12 experts in the model and 8 in the save",
    ),
    "more layers": (
        {"num_hidden_layers": 4},
        "MoE layers in the model but not in the save: model.layers.3.mlp.experts",
    ),
    "fewer MoE layers": (
        {"first_k_dense_replace": 2},
        "MoE layers in the save but not in the model: model.layers.1.mlp",
    ),
    "another width": ({"intermediate_size": 44}, "(40, 24) in the save and (44, 24) in the model"),
    "more parameters": ({"attention_bias": True}, "the save has no weight/model.layers.0.self_attn.kv_a_proj"),
    "fewer parameters": (
        {"tie_word_embeddings": True},
        "the save has exp_avg/lm_head.weight, exp_avg_sq",
    ),
    "another optimizer": ({"optimizer": "SGD"}, "the optimizer is SGD here and AdamW in the save"),
    "no scheduler": ({"scheduler": False}, "the learning rate scheduler is None here and WarmupLR in the save"),
}


def _attempt(engine: Any, balancer: Any, path: Path) -> tuple[str, bool]:
    """Return why the save was refused, and whether the state is unchanged."""
    before = state_digests(engine, balancer)
    message = refusal(lambda: checkpoint.load(engine, balancer, path))
    return message, state_digests(engine, balancer) == before


def _refuse(folder: str) -> dict[str, tuple[str, bool]]:
    engine, balancer = make(0, 2)
    train(engine, balancer, 0)
    good = checkpoint.save(engine, balancer, Path(folder, "good"), step=1, state={"config_hash": "ab"})
    train(engine, balancer, 1)
    found = {}
    for name, (damage, _) in DAMAGE.items():
        bad = Path(folder, name.replace("/", "-"), good.name)
        if dist.get_rank() == 0:
            shutil.copytree(good, bad)
            damage(bad)
        dist.barrier()
        found[name] = _attempt(engine, balancer, bad)
        assert not (bad.parent / "canary").exists(), "a pickle was run"
    for name, (config, _) in OTHERS.items():
        found[name] = _attempt(*make(0, 2, **config), good)
    assert checkpoint.load(engine, balancer, good) == {"config_hash": "ab"}
    return found


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the good save and the bad ones."""
    return tmp_path_factory.mktemp("refusals")


@pytest.fixture(scope="module")
def refused(saves: Path) -> list[dict[str, tuple[str, bool]]]:
    """Return why each bad save was refused, on each of two ranks."""
    return run_ranks(2, _refuse, str(saves), folder=saves)


@pytest.mark.parametrize("name", [*DAMAGE, *OTHERS])
def test_a_bad_save_is_refused_on_every_rank_and_changes_nothing(
    refused: list[dict[str, tuple[str, bool]]], name: str
) -> None:
    (first, unchanged), (second, also_unchanged) = (rank[name] for rank in refused)
    assert first == second
    assert unchanged and also_unchanged
    assert ({**DAMAGE, **OTHERS}[name][1]) in first


@pytest.mark.usefixtures("refused")
def test_the_good_save_has_every_tensor_once_with_versions_and_topology(saves: Path) -> None:
    body = manifest.read(saves / "good/step-00000001")
    kinds = {"weight", "exp_avg", "exp_avg_sq"}
    assert {f"{kind}/{EXPERT}/{e}" for kind in kinds for e in range(8)} <= body["tensors"].keys()
    assert {f"{kind}/model.norm.weight" for kind in kinds} <= body["tensors"].keys()
    gate = "model.layers.2.mlp.gate.e_score_correction_bias"
    assert [body["tensors"][f"{kind}/{gate}"]["dtype"] for kind in ("bias", "load")] == ["F32", "I64"]
    files = {path.name: load_file(path).keys() for path in (saves / "good/step-00000001").glob("*.safetensors")}
    assert sorted(key for keys in files.values() for key in keys) == sorted(body["tensors"])
    assert {body["tensors"][f"weight/{EXPERT}/{e}"]["file"] for e in range(4)} == {FIRST}
    assert {body["tensors"][f"weight/{EXPERT}/{e}"]["file"] for e in range(4, 8)} == {SECOND}
    assert body["config_hash"] == "ab"
    assert body["versions"].keys() == {"alfb_dist", "torch", "deepspeed", "transformers"}
    assert body["versions"]["torch"] == metadata.version("torch")
    assert body["versions"]["alfb_dist"] == alfb_dist.__version__
    assert body["topology"] == {"world_size": 2, "ep_degree": 2, "zero_stage": 0}
