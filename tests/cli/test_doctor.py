"""The verdicts of doctor on facts about a machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from support.doctor_verdicts import MEASURED, Row, check_row

from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.device import Device, judge_accelerator, judge_nccl
from alfb_dist.cli.doctor.examine import CHECKS, examine
from alfb_dist.cli.doctor.exchange import judge_exchange
from alfb_dist.cli.doctor.kernels import judge_kernels
from alfb_dist.cli.doctor.launchers import judge_launcher, judge_mpi
from alfb_dist.cli.doctor.machine import (
    GIB,
    judge_clock,
    judge_disk,
    judge_files,
    judge_memory,
    judge_shm,
)
from alfb_dist.cli.doctor.packages import judge_package, judge_python
from alfb_dist.cli.doctor.result import Result, ok, problem
from alfb_dist.cli.doctor.tracking import judge_wandb

BOUNDS = ">=3.11,<3.14"
NUMPY = Requirement("numpy>=2,<3")
PEFT = Requirement('peft>=0.21,<0.23; extra == "dev"')
BIN = Path("/env/bin")
HERE = "/env/bin/mpirun"
GPU = ("H100",) * 8
TWO_OF_2, TWO_OF_1 = "of 2\nof 2\n", "of 1\nof 1\n"


def kernel_facts(**changed: Any) -> Result:
    facts = {"cuda": False, "off": False, "compiler": "/usr/bin/cc", "loaded": True, "difference": 1e-7}
    return judge_kernels(**(facts | changed))


JUDGEMENTS: list[Row] = [
    (judge_python, ("3.11.7", BOUNDS), "ok", "3.11.7"),
    (judge_python, ("3.10.2", BOUNDS), "problem", "3.10.2 is not >=3.11,<3.14"),
    (judge_package, (NUMPY, "2.4.6"), "ok", "2.4.6"),
    (judge_package, (NUMPY, "1.26.0"), "problem", "pip install 'numpy<3,>=2'"),
    (judge_package, (NUMPY, None), "problem", "not installed"),
    (judge_package, (PEFT, None), "not applicable", "not installed"),
    (judge_package, (PEFT, "0.9"), "warning", "0.9 is not <0.23,>=0.21"),
    (judge_accelerator, (Device(None, "13.0", "580.1", GPU),), "ok", "8 x H100"),
    (judge_accelerator, (Device("cpu", None, None, ()),), "ok", "CPU"),
    (judge_accelerator, (Device(None, None, None, ()),), "ok", "DS_ACCELERATOR is not set"),
    (judge_accelerator, (Device("cpu", "13.0", None, ()),), "ok", "CPU"),
    (judge_accelerator, (Device("xpu", None, None, ()),), "problem", "cpu or cuda"),
    (judge_accelerator, (Device("cpu", "13.0", "580.1", GPU),), "warning", "leaves 8 x H100 unused"),
    (judge_accelerator, (Device("cuda", None, None, ()),), "problem", "built for CPU"),
    (judge_accelerator, (Device(None, None, "580.1", ()),), "warning", "built for CPU"),
    (judge_accelerator, (Device(None, "13.0", "470.2", ()),), "problem", "cannot use NVIDIA driver 470.2"),
    (judge_accelerator, (Device("cuda", "13.0", None, ()),), "problem", "no NVIDIA driver"),
    (judge_accelerator, (Device(None, "13.0", None, ()),), "warning", "there is no driver"),
    (judge_nccl, (Device(None, "13.0", "580.1", GPU, "2.28.9"),), "ok", "2.28.9"),
    (judge_nccl, (Device(None, "13.0", "580.1", GPU),), "problem", "without NCCL"),
    (judge_nccl, (Device("cpu", None, None, ()),), "not applicable", "gloo"),
    (judge_launcher, ("deepspeed", "/env/bin/deepspeed", BIN), "ok", "/env/bin/deepspeed"),
    (judge_launcher, ("deepspeed", "/usr/bin/deepspeed", BIN), "warning", "another Python"),
    (judge_launcher, ("deepspeed", None, BIN), "problem", 'export PATH="/env/bin:$PATH"'),
    (judge_mpi, (HERE, True, TWO_OF_2), "ok", "two processes met"),
    (judge_mpi, (HERE, True, TWO_OF_1), "warning", "another MPI than mpi4py"),
    (judge_mpi, (HERE, True, "oh\nno slots\n"), "warning", "fails: no slots"),
    (judge_mpi, (HERE, True, ""), "warning", "nothing was printed"),
    (judge_mpi, (HERE, True, None), "warning", "did not end"),
    (judge_mpi, (HERE, False, None), "warning", "mpi4py is not installed"),
    (judge_mpi, (None, True, None), "warning", "mpirun is not on PATH"),
    (judge_mpi, (None, False, None), "not applicable", "pip install 'alfb_dist[mpi]'"),
    (judge_shm, (2 * GIB,), "ok", "2.0 GiB"),
    (judge_shm, (64 * 2**20,), "warning", "--shm-size"),
    (judge_shm, (None,), "warning", "no /dev/shm"),
    (judge_files, (-1,), "ok", "no limit"),
    (judge_files, (1024,), "ok", "1024"),
    (judge_files, (256,), "warning", "ulimit -n"),
    (judge_memory, (8 * GIB, None), "ok", "8.0 GiB available"),
    (judge_memory, (8 * GIB, 4 * GIB), "ok", "4.0 GiB"),
    (judge_memory, (8 * GIB, 7 * GIB), "warning", "activations come on top"),
    (judge_memory, (8 * GIB, 9 * GIB), "problem", "ep_degree"),
    (judge_disk, ("runs", Path("runs"), True, 9 * GIB, 3 * GIB), "ok", "3.0 GiB needed"),
    (judge_disk, ("runs", Path("runs"), True, 9 * GIB, 0), "ok", "9.0 GiB free"),
    (judge_disk, ("runs", Path("runs"), True, 2 * GIB, 3 * GIB), "problem", "3.0 GiB needed"),
    (judge_disk, ("data", Path("data"), True, GIB // 2, 0), "warning", "512.0 MiB free"),
    (judge_disk, ("runs", Path("runs"), False, 9 * GIB, 0), "problem", "not writable"),
    (judge_clock, (1e9, 1e9 - 5, True), "ok", "2001-09-0"),
    (judge_clock, (1e9, 1e9 + 3600, True), "warning", "3600 s before the newest file"),
    (judge_clock, (1e9, 1e9 - 5, False), "warning", "jumped"),
    (judge_wandb, ("auto", "offline", False), "ok", "offline, as no account is configured"),
    (judge_wandb, ("offline", "offline", True), "ok", "offline;"),
    (judge_wandb, ("auto", "online", True), "ok", "online"),
    (judge_wandb, ("online", "online", False), "warning", "wandb login"),
    (judge_wandb, ("disabled", "disabled", True), "not applicable", "disabled"),
    (judge_exchange, ("gloo", MEASURED), "ok", "1.0 GiB/s each way, 100 us"),
    (judge_exchange, ("gloo", MEASURED | {"exact": False}), "problem", "arrived changed"),
    (judge_exchange, ("gloo", "not finished within 120 s"), "problem", "not finished within 120 s"),
    (lambda: kernel_facts(), (), "ok", "to 1e-07"),
    (lambda: kernel_facts(cuda=True), (), "not applicable", "on CPU only"),
    (lambda: kernel_facts(off=True), (), "warning", "unset ALFB_NATIVE"),
    (lambda: kernel_facts(compiler=None), (), "warning", "no C compiler"),
    (lambda: kernel_facts(loaded=False), (), "warning", "cannot compile them"),
    (lambda: kernel_facts(difference=0.01), (), "problem", "by 0.01 of"),
    (lambda: kernel_facts(difference=float("nan")), (), "problem", "by nan of"),
]


@pytest.mark.parametrize(("judge", "facts", "verdict", "words"), JUDGEMENTS)
def test_facts_get_their_verdict(
    judge: Callable[..., Result], facts: tuple[Any, ...], verdict: str, words: str
) -> None:
    check_row(judge, facts, verdict, words)


def hangs(case: Case) -> Iterator[Result]:
    yield ok("before", "")
    time.sleep(30)


def fails(case: Case) -> Iterator[Result]:
    yield ok("first", "")
    raise KeyError("thing")


def works(case: Case) -> Iterator[Result]:
    yield problem("last", "", "fix")


def test_check_that_hangs_or_fails_is_a_problem_and_does_not_stop_the_others() -> None:
    results = list(examine(Case(), (hangs, fails, works), limit=1))
    assert [(r.check, r.verdict) for r in results] == [
        ("before", "ok"),
        ("hangs", "problem"),
        ("first", "ok"),
        ("fails", "problem"),
        ("last", "problem"),
    ]
    assert results[1].found == "no answer within 1 s" and "KeyError: 'thing'" in results[3].found


def test_every_check_is_in_the_table_once() -> None:
    assert len(set(CHECKS)) == len(CHECKS) == 12
