#!/bin/sh
# Run torchrun on this host or, with --nodes N --node-rank R --master-addr A, on each of several. Options: --help
exec "${PYTHON:-python}" -m alfb_dist.cli launch --with torchrun "$@"
