"""The random state of this process: Python's, numpy's, torch's on CPU and on its CUDA device."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
import xxhash


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def capture() -> dict[str, Any]:
    """Return the random state of this process as plain JSON."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    key = numpy["state"]["key"]
    return {
        "python": [version, list(words), gauss],
        "numpy": {**numpy, "state": {"key": key.tolist(), "pos": int(numpy["state"]["pos"])}},
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
        "cuda": _text(torch.cuda.get_rng_state().numpy().tobytes()) if _cuda() else None,
    }


def restore(state: dict[str, Any]) -> None:
    """Set the random state of this process to a captured one."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and _cuda():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def seed(step: int, rank: int, world_size: int) -> int:
    """Seed the random states of this process by the three numbers; return the seed."""
    value = xxhash.xxh3_64_intdigest(f"{step}/{rank}/{world_size}".encode()) >> 1
    random.seed(value)
    np.random.seed(value % (1 << 32))
    torch.manual_seed(value)
    return value
