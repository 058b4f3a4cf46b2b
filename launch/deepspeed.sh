#!/bin/sh
# The deepspeed launcher on this host, or with --hostfile F on several over ssh (pdsh). All options: --help
exec "${PYTHON:-python}" -m alfb_dist.cli launch --with deepspeed "$@"
