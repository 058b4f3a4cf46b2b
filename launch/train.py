"""The entry point for launchers, the same as `alfb train`: `deepspeed launch/train.py --config configs/demo.toml`."""

from __future__ import annotations

import sys

from alfb_dist.cli import run_and_leave

if __name__ == "__main__":
    run_and_leave(["train", *sys.argv[1:]])
