"""Damage anywhere in a save is found and named before the save is used; reading a save runs no code."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoint_saves import (
    LAYER,
    accept,
    edit_manifest,
    fabricate,
    flip_some_bit,
    swap,
    swap_tensors,
    truncate,
)

import alfb_dist
from alfb_dist import checkpoint
from alfb_dist.checkpoint import manifest
from alfb_dist.checkpoint.safetensors_file import Entry, SafetensorsWriter, dtype_name, scan

KINDS = ["tensors-00000-000.safetensors", "balance.safetensors", "state.json", "rng-00000.json", "manifest.json"]


def test_a_good_save_verifies(tmp_path: Path) -> None:
    assert checkpoint.verify(fabricate(tmp_path, 100)) == []


@pytest.mark.parametrize("damage", [flip_some_bit, truncate])
@pytest.mark.parametrize("name", KINDS)
def test_every_flip_and_truncation_is_found_and_named(
    tmp_path: Path, name: str, damage: Callable[[Path, int], None]
) -> None:
    save = fabricate(tmp_path, 100)
    whole = (save / name).read_bytes()
    for seed in range(200):
        damage(save / name, seed)
        problems = checkpoint.verify(save)
        assert problems, f"seed {seed}"
        assert str(save / name) in problems[0]
        (save / name).write_bytes(whole)
    assert checkpoint.verify(save) == []


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_file_is_found_and_named(tmp_path: Path, name: str) -> None:
    save = fabricate(tmp_path, 100)
    (save / name).unlink()
    [problem] = checkpoint.verify(save)
    assert str(save / name) in problem


def test_swapped_files_are_found(tmp_path: Path) -> None:
    save, other = fabricate(tmp_path, 100), fabricate(tmp_path, 200)
    swap(save / KINDS[0], other / KINDS[0])
    assert "is damaged: its xxh3-128 is" in checkpoint.verify(save)[0]
    assert "is damaged: its xxh3-128 is" in checkpoint.verify(other)[0]


def test_a_file_of_another_save_is_found_even_if_its_own_hash_is_accepted(tmp_path: Path) -> None:
    save, other = fabricate(tmp_path, 100), fabricate(tmp_path, 200)
    shutil.copy(other / KINDS[0], save / KINDS[0])
    accept(save, KINDS[0])
    assert "does not match the manifest" in checkpoint.verify(save)[0]


def test_swapped_experts_are_found_by_their_fingerprints(tmp_path: Path) -> None:
    save = fabricate(tmp_path, 100)
    swap_tensors(save, f"weight/{LAYER}.down_proj/0", f"weight/{LAYER}.down_proj/1")
    [problem] = checkpoint.verify(save)
    assert problem == f"{save}: the weights of {LAYER} do not match the fingerprints of experts [0, 1]"


def test_a_renamed_save_is_found(tmp_path: Path) -> None:
    save = fabricate(tmp_path, 100)
    renamed = save.rename(tmp_path / "step-00000300")
    assert checkpoint.verify(renamed) == [f"{renamed} holds step 100: it was renamed or copied from another save"]


def test_a_manifest_of_another_format_or_a_later_version_is_refused(tmp_path: Path) -> None:
    save = fabricate(tmp_path, 100)
    edit_manifest(save, lambda body: body.update(version=2))
    [problem] = checkpoint.verify(save)
    assert problem.endswith("manifest.json is alfb_dist checkpoint 2; this program reads alfb_dist checkpoint 1")
    (save / "manifest.json").write_text(json.dumps({"weight_map": {}}))
    assert "not a manifest of alfb_dist" in checkpoint.verify(save)[0]


def test_a_manifest_cannot_name_files_outside_its_directory(tmp_path: Path) -> None:
    save = fabricate(tmp_path, 100)
    (tmp_path / "other.json").write_text("{}")
    record = {"bytes": 2, "xxh3_128": "0"}
    edit_manifest(save, lambda body: body["files"].update({"../other.json": record}))
    assert "names a file outside the directory" in checkpoint.verify(save)[0]


def test_other_programs_open_the_tensor_files(tmp_path: Path) -> None:
    save = fabricate(tmp_path, 100)
    tensors = load_file(save / KINDS[0]) | load_file(save / KINDS[1])
    listed = manifest.read(save)["tensors"]
    assert tensors.keys() == listed.keys()
    assert all(list(x.shape) == listed[key]["shape"] for key, x in tensors.items())


def test_tensors_of_any_size_and_type_are_written_and_scanned(tmp_path: Path) -> None:
    dtypes = (torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.uint8)
    tensors = {f"{d}/{n}": torch.arange(n).to(d) for d in dtypes for n in (0, 1, 7)} | {"number": torch.tensor(2.5)}
    entries = [Entry(key, dtype_name(x.dtype), tuple(x.shape)) for key, x in tensors.items()]
    writer = SafetensorsWriter(tmp_path / "x.safetensors", entries)
    for key, x in tensors.items():
        assert not writer.full
        writer.add(key, x)
    record = writer.finish()
    found = scan(tmp_path / "x.safetensors")
    assert found.xxh3_128 == record["xxh3_128"]
    assert {k: v["xxh3_128"] for k, v in found.tensors.items()} == {k: v["xxh3_128"] for k, v in writer.tensors.items()}
    opened = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(opened[key], x) and opened[key].dtype == x.dtype for key, x in tensors.items())


def test_a_save_is_described_from_its_manifest(tmp_path: Path) -> None:
    save = fabricate(tmp_path, 100)
    found = checkpoint.describe(save)
    assert (found["step"], found["world_size"], found["ep_degree"], found["zero_stage"]) == (100, 1, 1, 1)
    assert found["num_tensors"] == {"weight": 5, "exp_avg": 1, "bias": 1}
    assert found["num_experts"] == {LAYER: 2}
    assert found["bytes"] == sum((save / name).stat().st_size for name in KINDS[:-1])


def test_inspecting_a_save_needs_no_torch(tmp_path: Path) -> None:
    save = fabricate(tmp_path, 100)
    program = (
        "import sys; from pathlib import Path; from alfb_dist.checkpoint import describe, newest_good, verify\n"
        f"save = Path({str(save)!r})\n"
        "assert verify(save) == [] and newest_good(save.parent) == (save, []) and describe(save)['step'] == 100\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}


def _unsafe(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found += [name for name in names if name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [f"{node.value.id}.load"] if (node.value.id, node.attr) == ("torch", "load") else []
        elif isinstance(node, ast.keyword) and node.arg in ("weights_only", "allow_pickle", "trust_remote_code"):
            safe = node.arg == "weights_only"
            found += [] if isinstance(node.value, ast.Constant) and node.value.value is safe else [str(node.arg)]
    return found


def test_nothing_in_the_package_unpickles() -> None:
    package = Path(alfb_dist.__file__).parent
    found = {str(f.relative_to(package)): _unsafe(ast.parse(f.read_text())) for f in package.rglob("*.py")}
    assert {name: uses for name, uses in found.items() if uses} == {}
    assert _unsafe(ast.parse("torch.load(f)\nload(f, weights_only=False)")) == ["torch.load", "weights_only"]
