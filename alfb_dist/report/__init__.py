"""Where a run's records are shown and kept: terminal, metrics.jsonl, loads.bin, wandb, report.html."""

from alfb_dist.report.html import write_html
from alfb_dist.report.reporter import NullReporter, Reporter
from alfb_dist.report.run_data import RunData, read_run

__all__ = ["NullReporter", "Reporter", "RunData", "read_run", "write_html"]
