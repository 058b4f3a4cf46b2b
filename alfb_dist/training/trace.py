"""The times of the package's ranges in a Chrome trace of torch's profiler: pure functions of its events.

A range is marked in the forward only. An operation that autograd will differentiate has a sequence number in the trace,
which its node in the backward has too. So the range of each node is known, also in modules that are not ours, and
nothing is added to the graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]

BETWEEN_STEPS = ("evaluate", "checkpoint")
"""Ranges between two training steps. Ranges inside them are not counted."""
RANGES = ("data", "route", "dispatch", "exchange", "experts", "combine", "shared", "optimizer", "bias", *BETWEEN_STEPS)
"""The ranges of a training step, in their order."""
STEP = "ProfilerStep#"
_NODE = "autograd::engine::evaluate_function: "


@dataclass(frozen=True)
class Share:
    """The time of a range: milliseconds per step in forward and backward on the host, and on the accelerator."""

    name: str
    forward_ms: float
    backward_ms: float
    device_ms: float = 0.0


def _end(event: Event) -> float:
    return float(event["ts"] + event["dur"])


def _complete(events: Iterable[Event]) -> list[Event]:
    """Return the events that have a duration, sorted by start; of those that start together the longer first."""
    return sorted((e for e in events if e.get("ph") == "X" and "dur" in e), key=lambda e: (e["ts"], -e["dur"]))


def _is_range(event: Event) -> bool:
    return event.get("cat") == "user_annotation" and event["name"] in RANGES


class _OpenRanges:
    """The ranges that are open on each thread, while events are read in the order of their start."""

    def __init__(self) -> None:
        self._by_thread: dict[Any, list[Event]] = defaultdict(list)

    def around(self, event: Event) -> Event | None:
        """Return the innermost range in which the event starts, if any; ranges that ended before are closed."""
        stack = self._by_thread[event["tid"]]
        while stack and _end(stack[-1]) <= event["ts"]:
            stack.pop()
        return stack[-1] if stack else None

    def open(self, event: Event) -> None:
        self._by_thread[event["tid"]].append(event)


def _in_ranges(events: list[Event]) -> list[tuple[Event, str | None]]:
    """Return each event of the host with the name of the innermost range in which it starts on its thread."""
    ranges = _OpenRanges()
    found: list[tuple[Event, str | None]] = []
    for event in events:
        outer = ranges.around(event)
        if _is_range(event):
            ranges.open(event)
        else:
            found.append((event, None if outer is None else outer["name"]))
    return found


def mark_backward(events: list[Event]) -> list[Event]:
    """Return ranges named "NAME backward" over the nodes that differentiate the operations of NAME.

    Neighbouring nodes of a range are joined. Accumulating a gradient belongs to no range.
    """
    range_of: dict[int, str | None] = {}
    marks: list[Event] = []
    for event, name in _in_ranges(_complete(events)):
        number = event.get("args", {}).get("Sequence number")
        if not event["name"].startswith(_NODE):
            if number is not None and not event["name"].endswith("Backward"):
                range_of[number] = name  # the last operation with a number is the one that has the node
            continue
        of = name or range_of.get(number)
        last = marks[-1] if marks else None
        if of is None:
            marks.append({"name": ""})
        elif last and last["name"] == f"{of} backward" and last["tid"] == event["tid"]:
            last["dur"] = _end(event) - last["ts"]
        else:
            kept = {key: event[key] for key in ("ph", "ts", "dur", "pid", "tid")}
            marks.append({**kept, "cat": "user_annotation", "name": f"{of} backward"})
    return [mark for mark in marks if mark["name"]]


def _own_time(ranges: list[Event]) -> dict[str, float]:
    """Return the microseconds of each range by name, less those of ranges inside it. A range in a backward counts as
    backward."""
    spent: dict[str, float] = defaultdict(float)
    open_ranges = _OpenRanges()
    for event in ranges:
        outer = open_ranges.around(event)
        if outer is not None:
            spent[outer["name"]] -= event["dur"]
            if outer["name"].endswith(" backward"):
                event = event | {"name": f"{event['name'].removesuffix(' backward')} backward"}
        spent[event["name"]] += event["dur"]
        open_ranges.open(event)
    return spent


def _device_time(events: list[Event], marks: list[Event]) -> dict[str, float]:
    """Return the microseconds of the accelerator's kernels, by the range that launched them in forward or backward."""
    renamed = [{**mark, "name": mark["name"].removesuffix(" backward")} for mark in marks]
    launched = {
        event["args"]["External id"]: name
        for event, name in _in_ranges(_complete([*events, *renamed]))
        if event.get("cat") == "cpu_op" and "External id" in event.get("args", {})
    }
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            spent[launched.get(event.get("args", {}).get("External id")) or ""] += event["dur"]
    return spent


def _of_training(events: list[Event]) -> list[Event]:
    """Return the events except those inside an evaluation or a save."""
    between = [e for e in events if _is_range(e) and e["name"] in BETWEEN_STEPS]
    return [
        e
        for e in events
        if not any(e is not b and e.get("tid") == b["tid"] and b["ts"] <= e.get("ts", -1) < _end(b) for b in between)
    ]


def where_time_goes(events: list[Event], marks: list[Event]) -> list[Share]:
    """Return each range's share of a step, then the rest ("other"), then the whole step; empty without a whole step."""
    events, marks = _of_training(events), _of_training(marks)
    steps = [e for e in _complete(events) if e["name"].startswith(STEP) and e.get("cat") == "user_annotation"]
    if not steps:
        return []
    per_step_ms = 1 / (1e3 * len(steps))
    inside = [e for e in _complete([*events, *marks]) if _is_range(e) or e["name"].endswith(" backward")]
    spent = _own_time([e for e in inside if e.get("cat") == "user_annotation"])
    device = _device_time(events, marks)
    shares = [
        Share(name, spent[name] * per_step_ms, spent[f"{name} backward"] * per_step_ms, device[name] * per_step_ms)
        for name in RANGES
    ]
    whole = sum(step["dur"] for step in steps) * per_step_ms
    rest = whole - sum(s.forward_ms + s.backward_ms for s in shares)
    everything = sum(device.values()) * per_step_ms
    return [*shares, Share("other", rest, 0.0, device[""] * per_step_ms), Share("step", whole, 0.0, everything)]


def as_text(shares: list[Share]) -> str:
    """Return the shares as a plain-text table."""
    with_device = any(s.device_ms for s in shares)
    whole = shares[-1].forward_ms or 1.0
    lines = [f"{'ms a step':<12}{'forward':>10}{'backward':>10}{'share':>8}" + ("    device" if with_device else "")]
    for s in shares:
        if not (s.forward_ms or s.backward_ms):
            continue
        share = (s.forward_ms + s.backward_ms) / whole
        line = f"{s.name:<12}{s.forward_ms:>10.2f}{s.backward_ms:>10.2f}{share:>8.1%}"
        lines.append(line + (f"{s.device_ms:>10.2f}" if with_device else ""))
    return "\n".join(lines)
