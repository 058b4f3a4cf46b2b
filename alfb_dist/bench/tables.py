"""The figures of a benchmark as tables for a terminal or a document."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from alfb_dist.bench.sizes import FLOOR, Case
from alfb_dist.config.provenance import versions
from alfb_dist.report.wording import human

Figures = dict[str, Any]

HEAD = ("", "ms, median [min, max]", "times the products, median [min, max]", "kept, bytes a row", "peak")


def with_range(spread: dict[str, float]) -> str:
    """Return a median with its range."""
    return f"{spread['median']:.2f} [{spread['min']:.2f}, {spread['max']:.2f}]"


def case_rows(figures: Figures) -> list[tuple[str, ...]]:
    """Return a row for each contestant, the fastest first, with the columns of HEAD."""
    found = sorted(figures["results"].items(), key=lambda item: item[1]["ms"]["median"])
    return [
        (
            name if one["rounds"] > 1 else f"{name} (once)",
            with_range(one["ms"]),
            with_range(one["ratio"]),
            f"{one['kept_bytes_per_row']:.0f}" if "kept_bytes_per_row" in one else "",
            human(one["peak_bytes"]) if "peak_bytes" in one else "",
        )
        for name, one in found
    ]


def scaling_rows(all_figures: list[Figures], axis: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return (head, rows), a row for each value of the axis, with milliseconds and ratio of each contestant."""
    names = [*(name for name in all_figures[0]["results"] if name != FLOOR), FLOOR]
    rows = []
    for figures in all_figures:
        found = [figures["results"][name] for name in names]
        cells = [
            ("about " if one["rounds"] == 1 else "")
            + f"{one['ms']['median']:.2f}"
            + ("" if name == FLOOR else f" (x{one['ratio']['median']:.2f})")
            for name, one in zip(names, found)
        ]
        rows.append((str(figures["case"][axis]), *cells))
    return (axis, *names), rows


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return the table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def machine() -> str:
    """Return this machine's processor and the versions of the packages that matter, in one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    names = ("torch", "transformers", "deepspeed")
    packages = ", ".join(f"{name} {version}" for name, version in versions().items() if name in names)
    return f"{processor}, {os.cpu_count()} cores; Python {platform.python_version()}, {packages}"


def title(figures: Figures) -> str:
    """Return the case in one line, with the threads of a rank."""
    return f"{Case(**figures['case']).describe()}, {figures['threads']} thread(s) a rank"
