"""`python -m alfb_dist.cli`, the same as `alfb`."""

from alfb_dist.cli import run_and_leave

run_and_leave()
