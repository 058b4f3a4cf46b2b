"""The result of a check: a verdict, what was found and, for warnings and problems, the fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "problem", "not applicable"]


@dataclass(frozen=True)
class Result:
    """One line of the report.

    A problem would stop a run or make it silently wrong; what a warning names would make it slower or worse.
    """

    check: str
    verdict: Verdict
    found: str
    fix: str = ""


def ok(check: str, found: str) -> Result:
    """Return a result that needs no fix."""
    return Result(check, "ok", found)


def warning(check: str, found: str, fix: str) -> Result:
    """Return a result about something that would make a run slower or worse."""
    return Result(check, "warning", found, fix)


def problem(check: str, found: str, fix: str) -> Result:
    """Return a result about something that would stop a run or make it silently wrong."""
    return Result(check, "problem", found, fix)


def not_applicable(check: str, found: str) -> Result:
    """Return the result of a check that does not apply here."""
    return Result(check, "not applicable", found)
