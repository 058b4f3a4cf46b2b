"""`alfb launch`: one command for every launcher, which owns the signals, the exit code and the restarts."""
