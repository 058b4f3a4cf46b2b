#!/bin/sh
# Run the deepspeed launcher on this host or, with --hostfile F, on several over ssh (pdsh). Options: --help
exec "${PYTHON:-python}" -m alfb_dist.cli launch --with deepspeed "$@"
