#!/bin/sh
# torchrun on this host; with --nodes N --node-rank R --master-addr A, on each of several. All options: --help
exec "${PYTHON:-python}" -m alfb_dist.cli launch --with torchrun "$@"
