"""Weights & Biases: the mode that a run would use. No key is shown."""

from __future__ import annotations

from collections.abc import Iterator

from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.result import Result, not_applicable, ok, warning


def judge_wandb(wanted: str, mode: str, account: bool) -> Result:
    """Judge the mode. wanted: report.wandb. mode: what it resolves to. account: whether a key is configured."""
    if mode == "disabled":
        return not_applicable("wandb", "disabled")
    if mode == "online" and not account:
        fix = 'run `wandb login`, or set report.wandb = "offline"; metrics.jsonl is always written'
        return warning("wandb", "online, but no account is configured: runs would be recorded offline", fix)
    if mode == "online":
        return ok("wandb", "online, an account is configured")
    reason = "" if account or wanted == "offline" else ", as no account is configured"
    return ok("wandb", f"offline{reason}; `wandb sync` uploads runs later")


def check_wandb(case: Case) -> Iterator[Result]:
    """Check the mode and account of Weights & Biases."""
    from alfb_dist.report.wandb_sink import has_account, resolve_mode

    wanted = case.config.report.wandb if case.config else "auto"
    yield judge_wandb(wanted, resolve_mode(wanted), has_account())
