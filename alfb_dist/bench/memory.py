"""The memory that a forward keeps for its backward, and the peak of both."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from alfb_dist import cpu
from alfb_dist.bench.contestants import Run


def tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Yield the tensors in a value and in the containers inside it, down to `depth` levels."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, dict):
        yield from tensors_in(list(value.values()), depth)
    elif depth and is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, f.name) for f in fields(value)], depth)


def _attributes(out: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that autograd Functions keep as attributes of their contexts instead of saving them."""
    waiting: list[Node | None] = [out.grad_fn]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [next_node for next_node, _ in node.next_functions]
        yield from tensors_in(list(getattr(node, "__dict__", {}).values()))


def kept_bytes(run: Run, not_counted: Iterable[Tensor]) -> int:
    """Return the bytes of distinct storages that a forward keeps for its backward, without those of `not_counted`."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = run.forward()
        saved += _attributes(out)
        known = {t.untyped_storage().data_ptr() for t in not_counted}
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        run.backward(out)
    return sum(size for address, size in kept.items() if address not in known)


def peak_bytes(run: Run) -> int:
    """Return the most bytes that a forward and its backward had allocated at a time, beyond those before.

    The peaks of torch and of cpu's allocator are added, an upper bound if they do not fall together.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "trace.json")
        cpu.peak_growth()
        with profile(activities=activities, profile_memory=True) as recorded:
            run.backward(run.forward())
        pooled = cpu.peak_growth() or 0
        recorded.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak + pooled
