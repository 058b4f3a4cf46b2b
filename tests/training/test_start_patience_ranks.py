"""Until training begins, ranks wait for each other with a longer timeout, wherever the run's model is from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.tiny import tiny_model
from support.train_runs import config_of

from alfb_dist.distributed.collectives import known_groups
from alfb_dist.training.loop import train
from alfb_dist.training.run import start
from alfb_dist.training.settings import START_SECONDS

SHORT = "run.timeout_seconds=33"
RUNS = {
    "fresh": (),
    "released": ("model.config={{}}", "model.path='{folder}/released'"),
    "resumed": ("run.name='saved'", "run.resume=true"),
}


def timeouts(folder: str, *settings: str) -> tuple[set[float], set[float]]:
    """Return the timeouts of the groups made while the run is built, and of all groups when it starts."""
    made, inner = [], dist.new_group

    def new_group(*arguments: Any, **options: Any) -> Any:
        made.append(options.get("timeout"))
        return inner(*arguments, **options)

    dist.new_group = new_group
    start(config_of(Path(folder), SHORT, *(one.format(folder=folder) for one in settings)))
    last = {g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in known_groups()}
    return {timeout.total_seconds() for timeout in made if timeout is not None}, last


def saved(folder: str) -> int:
    return train(config_of(Path(folder), "run.name='saved'", "train.steps=2"))


@pytest.mark.parametrize("kind", RUNS)
def test_groups_have_the_start_up_timeout_until_the_run_starts(ranks: Any, tmp_path: Path, kind: str) -> None:
    tiny_model(1, vocab_size=320).save_pretrained(tmp_path / "released")
    if kind == "resumed":
        ranks(2, saved, str(tmp_path))
    assert ranks(2, timeouts, str(tmp_path), *RUNS[kind]) == [({START_SECONDS}, {33.0})] * 2
