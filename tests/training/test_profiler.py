"""Ranges of a trace: the nodes of the backward that belong to each, their own times; no cost without a profiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alfb_dist.profiling import _OFF, span
from alfb_dist.training.profiler import mark_shared_experts, open_recorder, phases
from alfb_dist.training.trace import Share, as_text, mark_backward, where_time_goes

NODE = "autograd::engine::evaluate_function: "


def event(name: str, ts: float, dur: float, number: int | None = None, tid: int = 1, **args: Any) -> dict[str, Any]:
    args |= {} if number is None else {"Sequence number": number}
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": args}


def mark(name: str, ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
    return event(name, ts, dur, tid=tid) | {"cat": "user_annotation"}


STEP = [
    mark("ProfilerStep#3", 0, 1000),
    mark("route", 10, 20),
    event("aten::mm", 12, 5, 1),
    mark("dispatch", 40, 100),
    mark("experts", 60, 30),  # inside dispatch
    event("aten::view", 61, 1, 2),  # sees the number that the next operation uses
    event("MLP", 65, 10, 2),
    event("aten::copy_", 95, 5, 3),
    event("aten::sum", 200, 5, 4),  # in no range
    event(f"{NODE}SumBackward0", 300, 10, 4, tid=2),
    event(f"{NODE}CopyBackwards", 310, 20, 3, tid=2),
    event(f"{NODE}MLPBackward", 330, 40, 2, tid=2),
    event("MLPBackward", 332, 30, 2, tid=2),  # what the node runs
    event(f"{NODE}MLPBackward", 372, 8, 2, tid=2),  # a neighbour
    event(f"{NODE}torch::autograd::AccumulateGrad", 380, 50, tid=2),
    event(f"{NODE}MmBackward0", 430, 10, 1, tid=2),
    mark("bias", 900, 50),
]


def test_a_node_of_the_backward_belongs_to_the_range_of_its_operation() -> None:
    marks = mark_backward(STEP)
    assert [(m["name"], m["ts"], m["dur"], m["tid"]) for m in marks] == [
        ("dispatch backward", 310, 20, 2),
        ("experts backward", 330, 50, 2),
        ("route backward", 430, 10, 2),
    ]


def test_a_sequence_number_used_again_means_the_newest_operation() -> None:
    again = [mark("combine", 500, 20), event("aten::add", 505, 2, 2), event(f"{NODE}AddBackward0", 600, 7, 2, tid=2)]
    assert [m["name"] for m in mark_backward([*STEP, *again])][-1] == "combine backward"


def test_the_shares_are_own_times_and_add_up_to_the_step() -> None:
    shares = {s.name: s for s in where_time_goes(STEP, mark_backward(STEP))}
    assert shares["dispatch"] == Share("dispatch", 0.07, 0.02)
    assert shares["experts"] == Share("experts", 0.03, 0.05)
    assert shares["route"] == Share("route", 0.02, 0.01)
    assert shares["step"].forward_ms == 1.0
    parts = [s.forward_ms + s.backward_ms for name, s in shares.items() if name != "step"]
    assert sum(parts) == pytest.approx(1.0)
    assert shares["other"].forward_ms == pytest.approx(0.75)


def test_accumulating_a_gradient_splits_a_range() -> None:
    late = [
        event(f"{NODE}torch::autograd::AccumulateGrad", 440, 9, tid=2),
        event(f"{NODE}TBackward0", 449, 1, 1, tid=2),
    ]
    marks = [(m["ts"], m["dur"]) for m in mark_backward([*STEP, *late]) if m["name"] == "route backward"]
    assert marks == [(430, 10), (449, 1)]


def test_two_steps_are_averaged() -> None:
    later = [e | {"ts": e["ts"] + 1000} for e in STEP]
    later[0]["name"] = "ProfilerStep#4"
    both = [*STEP, *later]
    expected = where_time_goes(STEP, mark_backward(STEP))
    for ours, theirs in zip(where_time_goes(both, mark_backward(both)), expected):
        assert ours.forward_ms == pytest.approx(theirs.forward_ms)
        assert ours.backward_ms == pytest.approx(theirs.backward_ms)


def test_ranges_of_an_evaluation_are_not_the_steps() -> None:
    between = [mark("evaluate", 600, 200), mark("route", 610, 30), mark("experts", 650, 30)]
    shares = {s.name: s for s in where_time_goes([*STEP, *between], mark_backward(STEP))}
    assert shares["evaluate"].forward_ms == pytest.approx(0.2)
    assert shares["route"].forward_ms == pytest.approx(0.02)


def test_a_range_inside_a_backward_is_part_of_the_backward() -> None:
    shares = {s.name: s for s in where_time_goes([*STEP, mark("exchange", 335, 15, tid=2)], mark_backward(STEP))}
    assert shares["exchange"] == Share("exchange", 0.0, pytest.approx(0.015))
    assert shares["experts"].backward_ms == pytest.approx(0.035)


def test_kernels_count_for_the_range_that_launched_them() -> None:
    events = [
        mark("ProfilerStep#3", 0, 1000),
        mark("experts", 10, 20),
        event("MLP", 12, 5, 2, **{"External id": 7}),
        event(f"{NODE}MLPBackward", 300, 50, 2, tid=2),
        event("aten::mm", 310, 5, tid=2, **{"External id": 8}),
        event("aten::add", 400, 5, **{"External id": 9}),
        *(event("gemm", 500 + i, 100 * i, tid=7, **{"External id": i}) | {"cat": "kernel"} for i in (7, 8, 9)),
    ]
    shares = {s.name: s for s in where_time_goes(events, mark_backward(events))}
    assert shares["experts"].device_ms == pytest.approx(1.5)
    assert shares["other"].device_ms == pytest.approx(0.9)
    assert shares["step"].device_ms == pytest.approx(2.4)
    assert "device" in as_text(list(shares.values()))


def test_without_a_whole_step_there_are_no_shares() -> None:
    assert where_time_goes(STEP[1:], []) == []


@pytest.mark.parametrize(("steps", "expected"), [(2, (0, 1, 1)), (3, (0, 1, 2)), (4, (0, 1, 3)), (6, (2, 1, 3))])
def test_a_short_run_is_recorded_too(steps: int, expected: tuple[int, int, int]) -> None:
    assert phases(steps) == expected
    assert phases(100) == (3, 1, 3)


def test_without_a_profiler_a_span_is_nothing() -> None:
    assert span("route") is _OFF
    with torch.profiler.profile() as recorded:
        with span("route"):
            pass
    assert [e.name for e in recorded.events() if e.name == "route"] == ["route"]
    assert span("route") is _OFF


class Block(nn.Module):
    """A block with a range of its own and shared experts."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_experts = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with span("route"):
            x = x * 2
        return self.shared_experts(x).tanh()


@pytest.mark.parametrize("steps", [2, 7])
def test_a_recorder_writes_a_trace_with_both_directions_and_reports_it(steps: int, tmp_path: Path) -> None:
    model, reported = Block(), []
    with open_recorder(tmp_path / "run", 3, 4, steps, model, reported.append) as recorder:
        for _ in range(steps):
            model(torch.ones(2, 4, requires_grad=True)).sum().backward()
            recorder.step()
    (file,) = (tmp_path / "run").iterdir()
    assert file.name == "trace-rank-3.json"
    names = [e["name"] for e in json.loads(file.read_text())["traceEvents"] if e.get("cat") == "user_annotation"]
    active = phases(steps)[2]
    for name in ("route", "shared", "route backward"):
        assert names.count(name) == active, name
    assert "shared backward" in names
    assert len(reported) == 1
    assert "shared" in reported[0] and str(file) in reported[0]


def test_other_ranks_record_nothing(tmp_path: Path) -> None:
    model = Block()
    for rank in (1, 2):
        with open_recorder(tmp_path, rank, 4, 5, model, print) as recorder:
            recorder.step()
    with open_recorder(tmp_path, 0, 4, 1, model, print) as recorder:  # a run of one step
        recorder.step()
    assert not list(tmp_path.iterdir()) and not model.shared_experts._forward_hooks


@pytest.mark.parametrize("name", ["shared_experts", "shared_expert", "shared_mlp"])
def test_only_shared_experts_are_hooked_under_each_of_their_names(name: str) -> None:
    block = nn.ModuleDict({name: nn.ModuleDict({"up_proj": nn.Linear(4, 4)}), "gate": nn.Linear(4, 4)})
    model = nn.ModuleDict({"mlp": block, "head": nn.Linear(4, 4)})
    mark_shared_experts(model)
    assert [found for found, m in model.named_modules() if m._forward_hooks] == [f"mlp.{name}"]
