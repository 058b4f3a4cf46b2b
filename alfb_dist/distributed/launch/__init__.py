"""`alfb launch`: one command for every launcher, responsible for signals, exit code and restarts."""
