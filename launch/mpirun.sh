#!/bin/sh
# mpirun on this host, or with --hostfile F on several; ranks are found by mpi4py. All options: --help
exec "${PYTHON:-python}" -m alfb_dist.cli launch --with mpirun "$@"
