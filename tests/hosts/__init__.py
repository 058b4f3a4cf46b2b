"""Hosts on one machine, for tests: network namespaces joined by a bridge, an sshd in each.

    python -m tests.hosts up --hosts 2                  # host1 and host2, each reachable from the other by ssh
    python -m tests.hosts run host1 -- ssh host2 hostname
    python -m tests.hosts link host2 down               # and up again
    python -m tests.hosts slow --delay-ms 20 --loss 0.01
    python -m tests.hosts down

A host has its own network, host name, process list, /run, /dev/shm, /etc/hosts and /etc/ssh; the other files are the
machine's, as on hosts with a shared file system. The machine's own network, /etc/ssh and ~/.ssh are never touched, and
two sets of hosts are isolated: the bridge of each is in its own namespace. Processes hold all of it, and it ends with
them, also when the test run that made it is killed.
"""
