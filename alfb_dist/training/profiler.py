"""The profiler of a training run: traces of a few steps of the first and the last rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from alfb_dist.moe.shared_experts import NAMES as SHARED_EXPERTS
from alfb_dist.training.trace import as_text, mark_backward, where_time_goes

MAX_WAIT, MAX_ACTIVE = 3, 3
"""Steps before the recording, which are slower than later ones, and steps recorded."""


def phases(steps: int) -> tuple[int, int, int]:
    """(steps to wait, to warm the profiler up in, to record) of a run with that many steps, at least 2."""
    active = min(MAX_ACTIVE, steps - 1)
    return min(MAX_WAIT, steps - active - 1), 1, active


def mark_shared_experts(model: nn.Module) -> None:
    """The forward of each block's shared experts is a range. They are the family's own: hooks mark it."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in SHARED_EXPERTS:
            _mark(module, "shared")


def _mark(module: nn.Module, name: str) -> None:
    opened: list[Any] = []

    def before(*_: Any) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    def after(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


class Recorder:
    """Records from the third step or so on; a context around the loop, in which `step` is called after each step.

    file: the trace, in the form that chrome://tracing and ui.perfetto.dev show. tell: is called with the table of
    where the time went, once the steps are recorded.
    """

    def __init__(self, file: Path, steps: int, model: nn.Module, tell: Callable[[str], None]) -> None:
        wait, warmup, active = phases(steps)
        mark_shared_experts(model)
        self._file, self._tell = file, tell
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            on_trace_ready=self._keep,
        )

    def __enter__(self) -> Recorder:
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, where)

    def step(self) -> None:
        """A step has ended."""
        self._profile.step()

    def _keep(self, recorded: Any) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self._file))
        trace = json.loads(self._file.read_text())
        marks = mark_backward(trace["traceEvents"])
        shares = where_time_goes(trace["traceEvents"], marks)
        trace["traceEvents"] += marks
        self._file.write_text(json.dumps(trace))
        if shares:
            self._tell(f"{self._file}\n{as_text(shares)}")


class NoRecorder:
    """Where nothing is recorded: the same methods, each of which does nothing."""

    def __enter__(self) -> NoRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self) -> None:
        """Nothing has happened."""


def open_recorder(
    folder: Path, rank: int, world: int, steps: int, model: nn.Module, tell: Callable[[str], None]
) -> Recorder | NoRecorder:
    """A Recorder of folder/trace-rank-R.json on the first and the last rank of a run of that many steps: at least 2."""
    if rank not in (0, world - 1) or steps < 2:
        return NoRecorder()
    return Recorder(folder / f"trace-rank-{rank}.json", steps, model, tell)
