"""A launcher and ranks without torch, to put `supervise` through everything that launchers and ranks may do.

python launch_fakes.py PLAY MAX_RESTARTS     supervises a launcher that starts two ranks, all of which act the play
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

from alfb_dist.distributed.launch import supervisor
from alfb_dist.distributed.launch.control_channel import ControlClient, ControlServer

RANKS = 2


def launcher(play: str, address: str, resume: str) -> int:
    """Starts the ranks and ends with the first exit code that is not 0, as launchers do."""
    if play == "launcher knows nothing":
        return 0
    ranks = [subprocess.Popen([sys.executable, __file__, "rank", str(r), play, address, resume]) for r in range(RANKS)]
    if play == "launcher is killed":
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    if play == "launcher leaves a process behind":
        subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(600)  # {address}"], start_new_session=True)
    codes = [rank.wait() for rank in ranks]
    if play == "host is cut off":
        threading.Event().wait()  # for the ssh to it, which notices nothing
    return next((code for code in codes if code), 0) % 256


def rank(number: int, play: str, address: str, resume: str) -> int:
    channel, stopped = ControlClient(address, number), threading.Event()
    channel.on_stop(stopped.set)
    if play != "crash before the start":
        channel.send(folder="runs/fake")
    print(f"rank {number} resume={resume}", flush=True)
    crash = {"crash": True, "crash before the start": resume == "False", "crash once": resume == "False"}.get(
        play, False
    )
    if number == 1 and (crash or play == "host is cut off"):
        os.kill(os.getpid(), signal.SIGKILL)
    if play in ("wait", "launcher is killed"):
        stopped.wait()
    if play == "deaf":
        threading.Event().wait()
    code = {
        "wait": 75,
        "launcher is killed": 75,
        "bad configuration": 78,
        "disagree": 75 * number,
        "host is cut off": 1,
    }.get(play, 0)
    channel.send(code=code)
    return code


def main() -> int:
    if sys.argv[1] == "launcher":
        return launcher(*sys.argv[2:])
    if sys.argv[1] == "rank":
        return rank(int(sys.argv[2]), *sys.argv[3:])
    play, max_restarts = sys.argv[1], int(sys.argv[2])
    supervisor.GRACE_SECONDS = 4.0
    return supervisor.supervise(
        lambda address, resume: (
            [sys.executable, __file__, "launcher", play, address, str(resume)],
            dict(os.environ),
        ),
        lambda: ControlServer("127.0.0.1"),
        ranks=RANKS,
        max_restarts=max_restarts,
    )


if __name__ == "__main__":
    sys.exit(main())
