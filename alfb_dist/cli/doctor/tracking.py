"""Weights & Biases: the mode that a run would take. No key is ever shown."""

from __future__ import annotations

from collections.abc import Iterator

from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.result import Result, not_applicable, ok, warning


def judge_wandb(wanted: str, mode: str, account: bool) -> Result:
    """wanted: report.wandb. mode: what it comes to. account: whether a key is at hand."""
    if mode == "disabled":
        return not_applicable("wandb", "disabled")
    if mode == "online" and not account:
        fix = 'wandb login, or report.wandb = "offline"; metrics.jsonl has everything in any case'
        return warning("wandb", "online, but no account is configured: runs would be recorded offline", fix)
    if mode == "online":
        return ok("wandb", "online, an account is configured")
    reason = "" if account or wanted == "offline" else ", as no account is configured"
    return ok("wandb", f"offline{reason}; `wandb sync` sends runs later")


def check_wandb(case: Case) -> Iterator[Result]:
    """wandb's mode and account."""
    from alfb_dist.report.wandb_sink import has_account, resolve_mode

    wanted = case.config.report.wandb if case.config else "auto"
    yield judge_wandb(wanted, resolve_mode(wanted), has_account())
