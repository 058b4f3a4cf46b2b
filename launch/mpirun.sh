#!/bin/sh
# Run mpirun on this host or, with --hostfile F, on several; ranks are found through mpi4py. Options: --help
exec "${PYTHON:-python}" -m alfb_dist.cli launch --with mpirun "$@"
