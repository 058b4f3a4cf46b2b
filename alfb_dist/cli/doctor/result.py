"""What a check found, with its verdict and, where all is not well, the fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "problem", "not applicable"]


@dataclass(frozen=True)
class Result:
    """One line of the report.

    A problem would stop a run or make it silently wrong; a warning would make it slower or poorer than it could be.
    """

    check: str
    verdict: Verdict
    found: str
    fix: str = ""


def ok(check: str, found: str) -> Result:
    """All is well."""
    return Result(check, "ok", found)


def warning(check: str, found: str, fix: str) -> Result:
    """A run would do with this, but could do better."""
    return Result(check, "warning", found, fix)


def problem(check: str, found: str, fix: str) -> Result:
    """A run would fail, or go wrong."""
    return Result(check, "problem", found, fix)


def not_applicable(check: str, found: str) -> Result:
    """There is nothing to check here."""
    return Result(check, "not applicable", found)
