"""A failed exchange names the rank that is missing, the position of others, or the failure that a rank reported."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hosts.cluster import Hosts
from support.ranks import PRELOAD
from support.ranks import _main as rank_main

from alfb_dist.distributed.agreement import on_every_rank
from alfb_dist.distributed.all_to_all import Exchange
from alfb_dist.distributed.collectives import all_sum, set_timeouts, share_objects
from alfb_dist.distributed.liveness import Peer, PeerError, Peers, failed_exchange
from alfb_dist.distributed.network import choose_interface, interface_of, own_address


def meet(timeout_seconds: float) -> Peers:
    """Let the ranks know each other, with this timeout."""
    peers = Peers(dist.get_rank())
    peers.meet(share_objects(peers.me, dist.group.WORLD))
    assert dist.group.WORLD is not None
    set_timeouts(timeout_seconds, [dist.group.WORLD])
    return peers


def exchange_by(way: str) -> Callable[[], None]:
    """Return something that needs the other two ranks: a sum of all, or rows to each."""
    assert dist.group.WORLD is not None
    exchange = Exchange(dist.group.WORLD)
    if way == "rows by network":
        os.environ["ALFB_SHARED_MEMORY"] = "0"
        return lambda: exchange.all_to_all([(torch.ones(3, 2), None)], [1, 1, 1], [1, 1, 1]) and None
    if way == "rows":
        return lambda: exchange.all_to_all([(torch.ones(3, 2), None)], [1, 1, 1]) and None
    return lambda: all_sum(torch.ones(1), dist.group.WORLD) and None


def stop_one(kind: str, way: str) -> None:
    """Stop, kill, delay or fail rank 1 in step 3; the others leave their error, and after how long it came."""
    peers, exchange = meet(2.0), exchange_by(way)
    others = {peer.rank: peer for peer in peers.others}
    start = time.monotonic()
    try:
        with peers.watch():
            for peers.step in (1, 2, 3):
                if peers.step == 3 and dist.get_rank() == 1:
                    stop_here(kind)
                start = time.monotonic()
                exchange()
    except PeerError as error:
        seconds = time.monotonic() - start
        if kind == "stopped" and dist.get_rank() == 0:
            time.sleep(1)  # rank 2 may still be asking
            os.kill(others[1].pid, signal.SIGCONT)
        leave(str(error), seconds)
    except ValueError as error:
        leave(f"own: {error}", 0.0)
    raise AssertionError("no error")


def stop_here(kind: str) -> None:
    time.sleep(0.5)  # until the others have read the exchange before
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "late":
        on_every_rank(lambda: time.sleep(8), None, ValueError)
    else:
        raise ValueError("a damaged file")


def leave(message: str, seconds: float) -> None:
    """Write what this rank saw, and end its process, as its groups are broken."""
    Path(os.environ["SEEN"], f"{dist.get_rank()}").write_text(f"{seconds}\n{message}")
    os._exit(0)


def run_in(folder: str, kind: str, way: str) -> None:
    os.environ["SEEN"] = folder
    stop_one(kind, way)


def seen_after(kind: str, way: str, folder: Path) -> dict[int, tuple[float, str]]:
    """Return the seconds that each of three ranks waited, and its error. All run until they end by themselves."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes = [
        context.Process(target=rank_main, args=(run_in, rank, 3, str(folder), (str(folder), kind, way)), daemon=True)
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    left = {int(f.name): f.read_text().split("\n", 1) for f in folder.iterdir() if f.name.isdigit()}
    return {rank: (float(seconds), message) for rank, (seconds, message) in left.items()}


@pytest.mark.parametrize(
    ("kind", "way", "expected"),
    [
        ("stopped", "sum", "no answer (stopped, or its host is cut off): rank 1 on "),
        ("killed", "sum", "the process is gone: rank 1 on "),
        ("late", "sum", "still at step 3, on_every_rank: rank 1 on "),
        ("failed", "sum", "failed at step 3, the loop: ValueError: a damaged file"),
        ("stopped", "rows", "no answer (stopped, or its host is cut off): rank 1 on "),
        ("killed", "rows", "the process is gone: rank 1 on "),
        ("late", "rows", "still at step 3, on_every_rank: rank 1 on "),
        ("late", "rows by network", "still at step 3, on_every_rank: rank 1 on "),
    ],
)
def test_the_rank_that_stops_is_named_with_step_and_operation(
    tmp_path: Path, kind: str, way: str, expected: str
) -> None:
    seen = seen_after(kind, way, tmp_path)
    for rank in (0, 2):
        waited, message = seen[rank]
        assert message.startswith(("step 3, all_sum: ", "step 3, all_to_all > ")), message
        assert expected in message
        assert f"This is rank {rank} on " in message
        assert message.count("rank 0") + message.count("rank 2") == 1  # the one to blame, and oneself
        assert waited < 60  # of torch's half hour
    if kind == "failed":
        assert seen[1][1] == "own: a damaged file"


def test_an_error_of_a_world_of_one_is_left_as_it_is() -> None:
    peers = Peers(0)
    with pytest.raises(KeyError), peers.watch():
        raise KeyError("x")
    peers.close()
    assert str(peers.me) == f"rank 0 on {socket.gethostname()} (pid {os.getpid()})"


def test_hosts_of_one_name_are_distinguished_by_their_addresses() -> None:
    assert str(Peer(2, "node", 7, ("10.0.0.9", 4711))) == "rank 2 on node at 10.0.0.9 (pid 7)"
    assert str(Peer(2, "node", 7, ("127.0.0.1", 4711))) == "rank 2 on node (pid 7)"


def broken() -> None:
    raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.2]:4711")


def test_a_reported_failure_outweighs_silence() -> None:
    left, failing, third = (Peers(rank) for rank in range(3))
    for peers in (left, failing, third):
        peers.meet([left.me, failing.me, third.me])
    failing.step = 7
    with pytest.raises(ValueError, match="disk full"), failing.watch():
        raise ValueError("disk full")
    failing.close()  # gone, as is the rank that failed next
    with pytest.raises(
        PeerError, match=r"rank 1 on .* failed at step 7, the loop: ValueError: disk full\. This is rank 0"
    ):
        with left.watch():
            broken()
    left.close()
    with pytest.raises(PeerError, match=r"rank 1 on .* failed at step 7") as error, third.watch():
        broken()
    third.close()
    assert "rank 0" not in str(error.value)


def test_the_cause_that_a_rank_found_is_reported_to_the_rest() -> None:
    first, gone, second = (Peers(rank) for rank in range(3))
    for peers in (first, gone, second):
        peers.meet([first.me, gone.me, second.me])
    gone.close()
    with pytest.raises(PeerError, match=r"the process is gone: rank 1 on "), first.watch():
        broken()
    first.close()
    with pytest.raises(PeerError, match=r"the process is gone: rank 1 on ") as error, second.watch():
        broken()
    second.close()
    assert "rank 0" not in str(error.value)


def test_only_errors_of_the_backend_are_failed_exchanges() -> None:
    assert failed_exchange(RuntimeError("[third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert failed_exchange(dist.DistBackendError("NCCL timed out"))
    assert not failed_exchange(RuntimeError("3 steps in a row were skipped"))
    assert not failed_exchange(ValueError("gloo"))
    assert not failed_exchange(KeyError("x"))


def test_the_interface_is_the_one_that_leads_to_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    assert choose_interface("127.0.0.1") == "chosen"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert choose_interface("no.such.host.invalid") is None
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")  # so that it is removed again afterwards
    assert choose_interface("127.0.0.1") == "lo"
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "lo"
    assert own_address("no.such.host.invalid") == "no.such.host.invalid"
    assert interface_of("192.0.2.1") is None


def test_the_interface_between_hosts_is_found_on_each(hosts: Hosts) -> None:
    code = "from alfb_dist.distributed.network import *; import sys; a = sys.argv[1]; "
    code += "print(own_address(a), choose_interface(a))"
    for host in hosts.names:
        for master in ("host1", hosts.address("host1")):
            found = hosts.run(host, [sys.executable, "-c", code, master])
            assert found.stdout.split() == [hosts.address(host), "eth0"], found.stderr
