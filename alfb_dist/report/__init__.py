"""Everything that a run shows and keeps about itself: console, metrics.jsonl, loads.bin, wandb, report.html."""

from alfb_dist.report.html import write_html
from alfb_dist.report.reporter import NullReporter, Reporter, open_reporter
from alfb_dist.report.run_data import RunData, read_run

__all__ = ["NullReporter", "Reporter", "RunData", "open_reporter", "read_run", "write_html"]
