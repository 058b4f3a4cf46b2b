"""Limits of this machine: shared memory, memory, open files, disk, clock."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

import alfb_dist
from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.device import uses_cuda
from alfb_dist.cli.doctor.result import Result, ok, problem, warning
from alfb_dist.report.wording import human

GIB = 2**30
LEAST_SHM = GIB // 2
LEAST_FILES = 1024
LEAST_DISK = GIB
CHECKPOINT_BYTES = 12  # a parameter: its float32 weight and two moments


def judge_shm(total: int | None) -> Result:
    """total: bytes of /dev/shm, None without it."""
    if total is None:
        return warning("shared memory", "there is no /dev/shm", "mount a tmpfs there: NCCL and MPI use it")
    if total < LEAST_SHM:
        mend = "docker run --shm-size=2g, shm_size in compose, or a larger tmpfs: NCCL and MPI use it"
        return warning("shared memory", f"/dev/shm has {human(total)}", mend)
    return ok("shared memory", f"/dev/shm has {human(total)}")


def judge_files(soft: int) -> Result:
    """soft: how many files a process may open; -1 without limit."""
    if 0 <= soft < LEAST_FILES:
        return warning("open files", f"at most {soft} a process", "ulimit -n 65536: each rank holds connections to all")
    return ok("open files", "no limit" if soft < 0 else f"at most {soft} a process")


def judge_memory(available: int, needed: int | None, whose: str = "this machine's ranks") -> Result:
    """needed: bytes of weights, gradients and optimizer, None without a configuration. whose: these are."""
    if needed is None:
        return ok("memory", f"{human(available)} available")
    found = f"{human(needed)} for weights, gradients and optimizer of {whose}; {human(available)} available"
    mend = "more ranks, a larger parallel.ep_degree, or ZeRO stage 1 or 2"
    if needed > available:
        return problem("memory", found, mend)
    if needed > 0.8 * available:
        return warning("memory", f"{found}; activations come on top", mend)
    return ok("memory", found)


def judge_disk(what: str, path: Path, writable: bool, free: int, needed: int) -> Result:
    """needed: bytes that will be written below the path."""
    check = f"disk for {what}"
    if not writable:
        return problem(check, f"{path} cannot be written", "give another folder, or its rights to this user")
    found = f"{human(free)} free at {path}, {human(needed)} needed" if needed else f"{human(free)} free at {path}"
    if needed and free < needed:
        return problem(check, found, "free some space, keep fewer checkpoints, or give another folder")
    if free < needed + LEAST_DISK:
        return warning(check, found, "free some space, keep fewer checkpoints, or give another folder")
    return ok(check, found)


def judge_clock(now: float, newest: float, steady: bool) -> Result:
    """newest: the time of the newest file of this package. steady: whether clock and monotonic clock run alike."""
    if newest > now + 60:
        found = f"the clock is {newest - now:.0f} s before the newest file of this package"
        return warning("clock", found, "set the clock; keep it with NTP (chrony)")
    if not steady:
        return warning("clock", "the clock jumped while it was watched", "keep it with NTP (chrony)")
    return ok("clock", time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now)))


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _disk(what: str, path: Path, needed: int) -> Result:
    there = _existing(path)
    return judge_disk(what, path, os.access(there, os.W_OK | os.X_OK), shutil.disk_usage(there).free, needed)


def available_memory() -> int:
    """Bytes of memory that processes can still take here, within the control group's limit."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return min(available, max(0, limit - used))


def free_gpu_memory() -> int:
    """Bytes that are free on the fullest GPU."""
    import torch

    return min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))


def check_limits(case: Case) -> Iterator[Result]:
    """Shared memory, open files and memory."""
    shm = Path("/dev/shm")
    yield judge_shm(shutil.disk_usage(shm).total if shm.is_dir() else None)
    yield judge_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    needed = None if case.estimate is None else case.estimate.state_bytes
    if uses_cuda():
        yield judge_memory(free_gpu_memory(), needed, "the rank of a GPU")
    else:
        yield judge_memory(available_memory(), None if needed is None else needed * case.local_ranks)


def check_disk(case: Case) -> Iterator[Result]:
    """The disks of the run folder and of the data."""
    config, sizes = case.config, case.estimate
    if config is None or sizes is None:
        yield _disk("runs", Path.cwd(), 0)
        return
    saves = config.train.keep_checkpoints + 1  # a new one is whole before an old one goes
    yield _disk("runs", Path(config.run.folder), sizes.parameters * CHECKPOINT_BYTES * saves)
    yield _disk("data", Path(config.data.cache), 0)


def check_clock(case: Case) -> Iterator[Result]:
    """The clock of this machine."""
    before = time.time() - time.monotonic()
    newest = max(path.stat().st_mtime for path in Path(alfb_dist.__file__).parent.rglob("*.py"))
    time.sleep(0.05)
    now = time.time()
    yield judge_clock(now, newest, abs(now - time.monotonic() - before) < 0.5)
