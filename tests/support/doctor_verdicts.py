"""Shared by doctor's tests: tables of facts and verdicts, verdicts by name, fake commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.result import Result
from alfb_dist.config import load_config

TEST_CONFIG = Path(__file__).parents[2] / "configs" / "test.toml"
MEASURED = {"latency_seconds": 1e-4, "bytes_per_second": 2**30, "exact": True}  # by the exchange test
Row = tuple[Callable[..., Any], tuple[Any, ...], str, str]
"""(judge, facts, verdict, words in the result)."""


def check_row(judge: Callable[..., Result], facts: tuple[Any, ...], verdict: str, words: str) -> None:
    """Assert that the facts get this verdict, with a fix for a warning or a problem."""
    result = judge(*facts)
    assert result.verdict == verdict
    assert words in result.found or words in result.fix, result
    assert bool(result.fix) == (verdict in ("warning", "problem"))


def verdicts(results: Iterable[Result]) -> dict[str, str]:
    return {result.check: result.verdict for result in results}


def put_command(directory: Path, name: str, script: str) -> None:
    """Put a command of this name into the directory."""
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


def case(*overrides: str, hosts: dict[str, int] | None = None) -> Case:
    hosts = hosts or {}
    return Case(load_config(TEST_CONFIG, overrides, world_size=sum(hosts.values()) or None), hosts=hosts)
