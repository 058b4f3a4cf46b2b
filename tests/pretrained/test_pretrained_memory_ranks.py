"""A rank needs memory for its share of a model and at most the largest single tensor to read and write it.

Measured by the kernel: the peak of the process's pages (VmHWM), reset just before, minus the pages then (VmRSS). Both
include mapped files, the allocator's slack and gloo's buffers.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run_ranks
from support.tiny import expert_parameters, tiny_model

import alfb_dist

MIB = 1 << 20
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "n_routed_experts": 8,
}
"""Two MoE layers of 8 experts: each 16 MiB of gate and up projections, the largest tensor, and 8 MiB down."""
LARGEST = 8 * 1024 * 512 * 4
SLACK = 3 * MIB
"""Memory of Python and the allocator."""


def memory(key: str) -> int:
    """Return the process's VmRSS or VmHWM, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


def start_measuring() -> int:
    """Reset the peak to the present memory and return that."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def measured(folder: Path, out: Path, layout: str, ep_degree: int, dtype: str) -> dict[str, int]:
    """Return the bytes of the model and of this rank's share, and the peaks of reading and of writing."""
    small = alfb_dist.from_pretrained(folder / "small", ep_degree=ep_degree)
    alfb_dist.save_pretrained(small, out / "small", layout=layout)  # so that everything is imported
    before = start_measuring()
    model: Any = alfb_dist.from_pretrained(folder / layout, ep_degree=ep_degree, dtype=dtype)
    found = {"read": memory("VmHWM") - before}
    found["share"] = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    experts = sum(p.numel() * p.element_size() for p in expert_parameters(model))
    found["whole"] = found["share"] + (ep_degree - 1) * experts
    before = start_measuring()
    alfb_dist.save_pretrained(model, out / "model", layout=layout, max_shard_bytes=20 * MIB)
    found["write"] = memory("VmHWM") - before
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of models written by transformers in both layouts, and a small one."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(folder / "small")
    model = tiny_model(**SIZES)
    for layout in ("fused", "per_expert"):
        model.save_pretrained(folder / layout, save_original_format=layout == "per_expert", max_shard_size="40MB")
    return folder


@pytest.mark.parametrize(
    ("ep_degree", "layout", "dtype"),
    [
        (2, "per_expert", "bfloat16"),
        (4, "fused", "float32"),
    ],
)
def test_rank_needs_its_share_and_one_tensor(
    folder: Path, tmp_path: Path, ep_degree: int, layout: str, dtype: str
) -> None:
    largest = LARGEST if dtype == "float32" else LARGEST // 2
    for found in run_ranks(ep_degree, measured, folder, tmp_path, layout, ep_degree, dtype, folder=tmp_path):
        assert found["share"] + largest + SLACK < found["whole"]  # or the other assertions could not fail
        assert found["read"] <= found["share"] + largest + SLACK, found
        assert found["write"] <= largest + SLACK, found
