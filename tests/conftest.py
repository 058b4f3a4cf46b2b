"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts.cluster import Hosts
from hosts.namespaces import what_is_missing
from support.ranks import run_ranks

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton, where it is installed, then runs on a CPU
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """One thread at the start of each test: few cores are shared by ranks, and the number decides a sum's rounding."""
    torch.set_num_threads(1)


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """ranks(world, fn, *args): run fn on `world` gloo ranks and return their results."""
    return lambda world, fn, *args, **kw: run_ranks(world, fn, *args, folder=tmp_path, **kw)


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """host1 and host2, for the whole session: a test that cuts or slows them down puts that right."""
    if reason := what_is_missing():
        pytest.skip(reason)
    with Hosts.up(tmp_path_factory.mktemp("hosts") / "two", 2) as made:
        yield made
