"""Limits of this machine: shared memory, open files, memory, disk, clock."""

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
CHECKPOINT_BYTES = 12  # per parameter: a float32 weight and two moments


def judge_shm(total: int | None) -> Result:
    """Judge the size of /dev/shm. total: in bytes, None if there is none."""
    if total is None:
        return warning("shared memory", "there is no /dev/shm", "mount a tmpfs there: NCCL and MPI need it")
    if total < LEAST_SHM:
        fix = "docker run --shm-size=2g, shm_size in compose, or a larger tmpfs: NCCL and MPI need it"
        return warning("shared memory", f"/dev/shm has {human(total)}", fix)
    return ok("shared memory", f"/dev/shm has {human(total)}")


def judge_files(soft: int) -> Result:
    """Judge the limit of open files. soft: files that a process may open; -1: no limit."""
    if 0 <= soft < LEAST_FILES:
        return warning(
            "open files", f"at most {soft} per process", "ulimit -n 65536: each rank is connected to all others"
        )
    return ok("open files", "no limit" if soft < 0 else f"at most {soft} per process")


def judge_memory(available: int, needed: int | None, whose: str = "this machine's ranks") -> Result:
    """Judge the memory, in bytes. needed: by weights, gradients and optimizer; None without a configuration."""
    if needed is None:
        return ok("memory", f"{human(available)} available")
    found = f"{human(needed)} for weights, gradients and optimizer of {whose}; {human(available)} available"
    fix = "more ranks, a larger parallel.ep_degree, or ZeRO stage 1 or 2"
    if needed > available:
        return problem("memory", found, fix)
    if needed > 0.8 * available:
        return warning("memory", f"{found}; activations come on top", fix)
    return ok("memory", found)


def judge_disk(what: str, path: Path, writable: bool, free: int, needed: int) -> Result:
    """Judge a disk. free, needed: bytes; needed is what a run will write below the path."""
    check = f"disk for {what}"
    if not writable:
        return problem(check, f"{path} is not writable", "choose another directory, or give this user write access")
    fix = "free some space, keep fewer checkpoints, or choose another directory"
    found = f"{human(free)} free at {path}, {human(needed)} needed" if needed else f"{human(free)} free at {path}"
    if needed and free < needed:
        return problem(check, found, fix)
    if free < needed + LEAST_DISK:
        return warning(check, found, fix)
    return ok(check, found)


def judge_clock(now: float, newest: float, steady: bool) -> Result:
    """Judge the clock. newest: time of this package's newest file. steady: whether it runs like the monotonic clock."""
    if newest > now + 60:
        found = f"the clock is {newest - now:.0f} s before the newest file of this package"
        return warning("clock", found, "synchronize the clock with NTP (chrony)")
    if not steady:
        return warning("clock", "the clock jumped during the check", "synchronize the clock with NTP (chrony)")
    return ok("clock", time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now)))


def _existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _disk(what: str, path: Path, needed: int) -> Result:
    existing = _existing(path)
    writable = os.access(existing, os.W_OK | os.X_OK)
    return judge_disk(what, path, writable, shutil.disk_usage(existing).free, needed)


def available_memory() -> int:
    """Return the bytes of available memory, within the control group's limit."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return min(available, max(0, limit - used))


def free_gpu_memory() -> int:
    """Return the free bytes on the GPU that has the fewest."""
    import torch

    return min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))


def check_limits(case: Case) -> Iterator[Result]:
    """Check shared memory, open files and memory."""
    shm = Path("/dev/shm")
    yield judge_shm(shutil.disk_usage(shm).total if shm.is_dir() else None)
    yield judge_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    needed = None if case.estimate is None else case.estimate.state_bytes
    if uses_cuda():
        yield judge_memory(free_gpu_memory(), needed, "the rank of each GPU")
    else:
        yield judge_memory(available_memory(), None if needed is None else needed * case.local_ranks)


def check_disk(case: Case) -> Iterator[Result]:
    """Check the disks of the runs and of the data."""
    config, sizes = case.config, case.estimate
    if config is None or sizes is None:
        yield _disk("runs", Path.cwd(), 0)
        return
    saves = config.train.keep_checkpoints + 1  # a new one is complete before an old one is removed
    yield _disk("runs", Path(config.run.folder), sizes.parameters * CHECKPOINT_BYTES * saves)
    yield _disk("data", Path(config.data.cache), 0)


def check_clock(case: Case) -> Iterator[Result]:
    """Check the clock of this machine."""
    before = time.time() - time.monotonic()
    newest = max(path.stat().st_mtime for path in Path(alfb_dist.__file__).parent.rglob("*.py"))
    time.sleep(0.05)
    now = time.time()
    yield judge_clock(now, newest, abs(now - time.monotonic() - before) < 0.5)
