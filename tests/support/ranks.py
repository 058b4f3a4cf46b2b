"""Run a function on several gloo ranks of one machine, and get each rank's result or the first true error."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",  # ZeRO imports it, which takes 2 s in each process
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "alfb_dist",
]


class RankError(AssertionError):
    """A rank failed; the message is the earliest traceback."""


def _main(fn: Callable[..., Any], rank: int, world: int, folder: str, args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    os.environ["LOCAL_WORLD_SIZE"] = str(world)  # so that ranks of a run share the cores
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        result = fn(*args)
        Path(folder, f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()  # no rank leaves while another still needs its connections
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"{time.time()}\n{traceback.format_exc()}")
        os._exit(1)


def run_ranks(
    world: int,
    fn: Callable[..., Any],
    *args: Any,
    folder: Path,
    timeout_seconds: float = 90,
    method: str = "forkserver",
) -> list[Any]:
    """What `fn(*args)` returned on each of `world` ranks, in rank order.

    fn: a module-level function. folder: an empty folder (tmp_path). Raises RankError with the traceback of the rank
    that failed first, so the cause is seen and not the broken connection that follows it.
    """
    context = mp.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOAD)
    folder = Path(folder, f"ranks-{time.monotonic_ns()}")
    folder.mkdir(parents=True)
    ranks = [context.Process(target=_main, args=(fn, r, world, str(folder), args), daemon=True) for r in range(world)]
    for p in ranks:
        p.start()
    deadline = time.monotonic() + timeout_seconds
    while any(p.is_alive() for p in ranks) and time.monotonic() < deadline:
        if any(p.exitcode not in (None, 0) for p in ranks):
            time.sleep(0.3)  # let the other ranks write their errors too
            break
        time.sleep(0.005)
    alive = [r for r, p in enumerate(ranks) if p.is_alive()]
    for p in ranks:
        p.kill() if p.is_alive() else None
        p.join()
    errors = sorted((float(f.read_text().split("\n", 1)[0]), f) for f in folder.glob("error-*"))
    if errors:
        raise RankError(f"{errors[0][1].name}: {errors[0][1].read_text().split(chr(10), 1)[1]}")
    died = {r: p.exitcode for r, p in enumerate(ranks) if p.exitcode != 0 and r not in alive}
    if died:
        raise RankError(f"ranks died without a word, exit codes {died}")
    if alive:
        raise RankError(f"ranks {alive} were still running after {timeout_seconds} s")
    return [pickle.loads((folder / f"result-{r}").read_bytes()) for r in range(world)]
