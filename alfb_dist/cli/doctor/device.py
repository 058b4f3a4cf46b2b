"""The accelerator: DS_ACCELERATOR, torch's build and NVIDIA's driver."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.result import Result, not_applicable, ok, problem, warning

DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Device:
    """wanted: DS_ACCELERATOR. built_for: CUDA version of torch's build. driver: version of NVIDIA's kernel driver."""

    wanted: str | None
    built_for: str | None
    driver: str | None
    gpus: tuple[str, ...]
    nccl: str | None = None


def judge_accelerator(device: Device) -> Result:
    """Judge whether DS_ACCELERATOR, torch's build and the driver fit together."""
    check, wanted, built_for, driver = "accelerator", device.wanted, device.built_for, device.driver
    if wanted not in (None, "cpu", "cuda"):
        return problem(check, f"DS_ACCELERATOR is {wanted}", "set DS_ACCELERATOR to cpu or cuda: only these are tested")
    if device.gpus and wanted == "cpu":
        return warning(check, f"DS_ACCELERATOR=cpu leaves {_count(device.gpus)} unused", "unset DS_ACCELERATOR")
    if device.gpus:
        return ok(check, f"{_count(device.gpus)}, driver {driver or 'unknown'}, torch built for CUDA {built_for}")
    if wanted == "cuda" and built_for is None:
        return problem(check, "DS_ACCELERATOR=cuda, but torch is built for CPU", "install torch built for CUDA")
    if driver and built_for is None:
        found = f"NVIDIA driver {driver}, but torch is built for CPU"
        return warning(check, found, "install torch built for CUDA, or set DS_ACCELERATOR=cpu to train on CPU")
    if driver and wanted != "cpu":
        found = f"torch, built for CUDA {built_for}, cannot use NVIDIA driver {driver}"
        fix = f"install a driver for CUDA {built_for}, or torch built for the driver's CUDA; check CUDA_VISIBLE_DEVICES"
        return problem(check, found, fix)
    if wanted == "cuda":
        return problem(
            check, "DS_ACCELERATOR=cuda, but there is no NVIDIA driver", "install one, or set DS_ACCELERATOR=cpu"
        )
    if built_for and wanted is None:
        return warning(check, "CPU: torch is built for CUDA, but there is no driver", "set DS_ACCELERATOR=cpu")
    return ok(check, "CPU" if wanted else "CPU, the only device (DS_ACCELERATOR is not set)")


def judge_nccl(device: Device) -> Result:
    """Judge whether torch has NCCL for the GPUs."""
    if not device.gpus or device.wanted == "cpu":
        return not_applicable("nccl", "ranks on CPU communicate over gloo")
    if device.nccl is None:
        return problem("nccl", "torch is built without NCCL", "install torch built with NCCL")
    return ok("nccl", device.nccl)


def _count(gpus: tuple[str, ...]) -> str:
    return f"{len(gpus)} x {gpus[0]}" if len(set(gpus)) == 1 else ", ".join(gpus)


def driver_version(path: Path = DRIVER) -> str | None:
    """Return the version of NVIDIA's kernel driver, or None."""
    try:
        text = path.read_text()
    except OSError:
        return None
    match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else None


def uses_cuda() -> bool:
    """Return whether ranks would run on GPUs here."""
    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def find_device() -> Device:
    """Return the device of this machine."""
    import torch

    gpus: tuple[str, ...] = ()
    nccl = None
    if torch.version.cuda and torch.cuda.is_available():
        gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        if torch.distributed.is_nccl_available():
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return Device(os.environ.get("DS_ACCELERATOR"), torch.version.cuda, driver_version(), gpus, nccl)


def check_accelerator(case: Case) -> Iterator[Result]:
    """Check the accelerator and NCCL."""
    device = find_device()
    yield judge_accelerator(device)
    yield judge_nccl(device)
