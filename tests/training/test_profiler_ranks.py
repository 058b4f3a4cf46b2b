"""A run with --profile on two ranks: traces with every range in both directions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist

from alfb_dist.config import load_config
from alfb_dist.distributed.launch.signals import DONE
from alfb_dist.training.loop import train

TEST_CONFIG = Path(__file__).parents[2] / "configs" / "test.toml"


def run(folder: str) -> int:
    places = (f"run.folder='{folder}/runs'", f"data.cache='{folder}/cache'", "train.checkpoint_interval=0")
    return train(load_config(TEST_CONFIG, places, world_size=dist.get_world_size()), profile=True)


def test_a_profiled_run_leaves_traces_of_two_ranks(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, run, str(tmp_path)) == [DONE, DONE]
    for rank in (0, 1):
        trace = json.loads((tmp_path / "runs" / "test" / f"trace-rank-{rank}.json").read_text())
        found = Counter(e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation")
        # three of six steps, two micro-batches, two MoE layers; the last step evaluates: two batches more
        forward_only = {"optimizer": 6, "bias": 3, "data": 3, "evaluate": 1, "checkpoint": 1}
        assert {name: found[name] for name in forward_only} == forward_only
        for name in ("route", "dispatch", "experts", "combine", "shared"):
            times = 2 if name in ("dispatch", "shared") else 1  # sent and received; run early, and handed out
            assert found[name] == times * (3 * 2 * 2 + 2 * 2), name
            assert found[f"{name} backward"] >= 3 * 2 * 2, name
