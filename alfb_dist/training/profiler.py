"""The profiler of a training run: traces of a few steps on the first and the last rank."""

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
"""Steps before the recording, which are slower than later ones; and steps recorded."""


def phases(steps: int) -> tuple[int, int, int]:
    """Return the numbers of steps to wait, to warm up the profiler and to record. steps: of the run, at least 2."""
    active = min(MAX_ACTIVE, steps - 1)
    return min(MAX_WAIT, steps - active - 1), 1, active


def mark_shared_experts(model: nn.Module) -> None:
    """Mark the forward of each block's shared experts as a range, by hooks, since the modules are the family's."""
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
    """A context around the training loop that records a few steps; `step` is called after each one.

    file: the trace, for chrome://tracing or ui.perfetto.dev. report: called with a table of the ranges' times once the
    steps are recorded.
    """

    def __init__(self, file: Path, steps: int, model: nn.Module, report: Callable[[str], None]) -> None:
        wait, warmup, active = phases(steps)
        mark_shared_experts(model)
        self._file, self._report = file, report
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=wait, warmup=warmup, active=active, repeat=1),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> Recorder:
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, where)

    def step(self) -> None:
        """Count a finished step."""
        self._profile.step()

    def _write(self, recorded: Any) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self._file))
        trace = json.loads(self._file.read_text())
        marks = mark_backward(trace["traceEvents"])
        shares = where_time_goes(trace["traceEvents"], marks)
        trace["traceEvents"] += marks
        self._file.write_text(json.dumps(trace))
        if shares:
            self._report(f"{self._file}\n{as_text(shares)}")


class NoRecorder:
    """A recorder that does nothing."""

    def __enter__(self) -> NoRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self) -> None:
        """Do nothing."""


def open_recorder(
    folder: Path, rank: int, world: int, steps: int, model: nn.Module, report: Callable[[str], None]
) -> Recorder | NoRecorder:
    """Return a Recorder of folder/trace-rank-R.json on the first and the last rank, if the run has at least 2 steps."""
    if rank not in (0, world - 1) or steps < 2:
        return NoRecorder()
    return Recorder(folder / f"trace-rank-{rank}.json", steps, model, report)
