"""doctor's verdicts: each judgement on facts that are well, doubtful, wrong or absent, and each way to find facts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import save_file

from alfb_dist.config import ConfigError, load_config
from alfb_dist.doctor import CHECKS, examine, exchange, hosts, kernels, launchers, machine, packages, pitfalls
from alfb_dist.doctor.case import Case
from alfb_dist.doctor.device import Device, driver_version, judge_accelerator, judge_nccl
from alfb_dist.doctor.exchange import judge_exchange
from alfb_dist.doctor.hosts import Answer, clock_skew, judge_answer, judge_pdsh
from alfb_dist.doctor.kernels import judge_kernels
from alfb_dist.doctor.launchers import judge_launcher, judge_mpi
from alfb_dist.doctor.machine import (
    GIB,
    check_disk,
    check_limits,
    judge_clock,
    judge_disk,
    judge_files,
    judge_memory,
    judge_shm,
)
from alfb_dist.doctor.network import judge_chosen, judge_interface, judge_port, port_is_free, route_to
from alfb_dist.doctor.packages import judge_package, judge_python
from alfb_dist.doctor.result import Result, ok, problem
from alfb_dist.doctor.tracking import judge_wandb

TEST_CONFIG = Path(__file__).parent.parent / "configs" / "test.toml"
BOUNDS = ">=3.11,<3.14"
NUMPY = Requirement("numpy>=2,<3")
PEFT = Requirement('peft>=0.21,<0.23; extra == "dev"')
BIN = Path("/env/bin")
HERE = "/env/bin/mpirun"
GPU = ("H100",) * 8
TWO_OF_2, TWO_OF_1 = "of 2\nof 2\n", "of 1\nof 1\n"
MEASURED = {"latency_seconds": 1e-4, "bytes_per_second": 2**30, "exact": True}
ETH0 = ["lo", "eth0"]


def kernel_facts(**changed: Any) -> Result:
    facts = {"cuda": False, "off": False, "compiler": "/usr/bin/cc", "loaded": True, "difference": 1e-7}
    return judge_kernels(**(facts | changed))


JUDGEMENTS: list[tuple[Callable[..., Any], tuple[Any, ...], str, str]] = [
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
    (judge_accelerator, (Device("cuda", None, None, ()),), "problem", "build for CPU"),
    (judge_accelerator, (Device(None, None, "580.1", ()),), "warning", "build for CPU"),
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
    (judge_pdsh, (2, "/usr/bin/pdsh"), "ok", "/usr/bin/pdsh"),
    (judge_pdsh, (2, None), "problem", "apt-get install pdsh"),
    (judge_pdsh, (1, None), "not applicable", "several hosts"),
    (judge_port, (29500, True), "ok", "29500 is free"),
    (judge_port, (29500, False), "warning", "--master_port"),
    (judge_interface, ("node1", "10.0.0.2", "eth0", "10.0.0.2", True, ""), "ok", "eth0, 10.0.0.2, toward node1"),
    (judge_interface, ("127.0.0.1", "127.0.0.1", "lo", None, False, ""), "ok", "lo"),
    (judge_interface, ("node1", None, "", None, True, ""), "problem", "no route for node1"),
    (judge_interface, ("node1", "127.0.0.1", "lo", None, True, "eth0"), "problem", "other hosts cannot reach"),
    (judge_interface, ("node1", "10.0.0.2", "eth0", "127.0.1.1", True, ""), "problem", "GLOO_SOCKET_IFNAME=eth0"),
    (judge_interface, ("node1", "10.0.0.2", "eth0", None, True, ""), "problem", "loopback"),
    (judge_interface, ("node1", "10.0.0.2", "eth0", "127.0.1.1", True, "eth0"), "ok", "eth0"),
    (judge_chosen, ("GLOO_SOCKET_IFNAME", "ib0", ETH0), "problem", "there is no interface ib0"),
    (judge_chosen, ("NCCL_SOCKET_IFNAME", "=eth", ETH0), "problem", "set it to one of lo, eth0"),
    (judge_chosen, ("NCCL_SOCKET_IFNAME", "^lo,eth", ETH0), "problem", "no interface"),
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
    (judge_disk, ("runs", Path("runs"), False, 9 * GIB, 0), "problem", "cannot be written"),
    (judge_clock, (1e9, 1e9 - 5, True), "ok", "2001-09-0"),
    (judge_clock, (1e9, 1e9 + 3600, True), "warning", "3600 s before the newest file"),
    (judge_clock, (1e9, 1e9 - 5, False), "warning", "jumped"),
    (judge_wandb, ("auto", "offline", False), "ok", "offline, as no account is configured"),
    (judge_wandb, ("offline", "offline", True), "ok", "offline;"),
    (judge_wandb, ("auto", "online", True), "ok", "online"),
    (judge_wandb, ("online", "online", False), "warning", "wandb login"),
    (judge_wandb, ("disabled", "disabled", True), "not applicable", "disabled"),
    (judge_exchange, ("gloo", MEASURED), "ok", "1.0 GiB/s each way, 100 us"),
    (judge_exchange, ("gloo", MEASURED | {"exact": False}), "problem", "otherwise than they were sent"),
    (judge_exchange, ("gloo", "no end within 120 s"), "problem", "no end within 120 s"),
    (pitfalls.judge_rate, ("sign", 0.001, "sigmoid", 64), "ok", "sigmoid"),
    (pitfalls.judge_rate, ("sign", 0.001, None, 64), "ok", "of the family's own"),
    (pitfalls.judge_rate, ("sign", 0.001, "softmax", 64), "warning", "balance.rate = 3e-05"),
    (pitfalls.judge_rate, ("sign", 3e-5, "softmax", 64), "ok", "average 0.016"),
    (pitfalls.judge_rate, ("proportional", 0.001, "softmax", 64), "ok", "softmax"),
    (pitfalls.judge_rate, ("sign", 0.0, "sigmoid", 64), "warning", "never move"),
    (pitfalls.judge_annealing, (0.001, 9500, 10000), "ok", "from step 9500"),
    (pitfalls.judge_annealing, (0.001, None, 200), "ok", "short run"),
    (pitfalls.judge_annealing, (0.001, None, 10000), "warning", "zero_at_step = 9500"),
    (pitfalls.judge_annealing, (0.001, 300, 200), "warning", "300 is not reached"),
    (pitfalls.judge_annealing, (0.0, None, 10000), "not applicable", "rate is 0"),
    (pitfalls.judge_mode, ("", "auto", 0.001), "ok", "auto"),
    (pitfalls.judge_mode, ("model", "train", 0.001), "ok", "the biases of model move"),
    (pitfalls.judge_mode, ("model", "auto", 0.001), "warning", "stay as released"),
    (pitfalls.judge_mode, ("", "freeze", 0.001), "warning", "stay 0"),
    (pitfalls.judge_losses, (0.001, 0.0, 0.0), "ok", "none"),
    (pitfalls.judge_losses, (0.001, 1e-4, 0.0), "ok", "sequence_loss_alpha 0.0001"),
    (pitfalls.judge_losses, (0.0, 0.0, 0.001), "ok", "instead of the bias"),
    (pitfalls.judge_losses, (0.001, 0.0, 0.001), "warning", "batch_loss_alpha = 0"),
    (pitfalls.judge_losses, (0.001, 0.1, 0.0), "warning", "DeepSeek-V3 takes 0.0001"),
    (pitfalls.judge_accumulation, (True, 1, 4), "ok", "4 micro-batches"),
    (pitfalls.judge_accumulation, (True, 2, 1), "ok", "ZeRO-2"),
    (pitfalls.judge_accumulation, (True, 2, 4), "warning", "after each of 4"),
    (pitfalls.judge_accumulation, (False, 1, 1), "problem", "managed_gradient_accumulation"),
    (pitfalls.judge_layout, ("packed",), "ok", "none"),
    (pitfalls.judge_layout, ("padded",), "ok", "attention masks"),
    (pitfalls.judge_checkpoints, (500, 10000, None), "ok", "at most 500 steps"),
    (pitfalls.judge_checkpoints, (0, 50, None), "ok", "at most 50 steps"),
    (pitfalls.judge_checkpoints, (0, 10000, None), "warning", "the whole run"),
    (pitfalls.judge_checkpoints, (500, 10000, 2.0), "ok", "up to 17 min"),
    (pitfalls.judge_checkpoints, (500, 10000, 6.0), "warning", "up to 50 min"),
    (pitfalls.judge_groups, (8, {"a": 8, "b": 8}), "ok", "stay within"),
    (pitfalls.judge_groups, (8, {"a": 4, "b": 4}), "warning", "over hosts of 4"),
    (pitfalls.judge_groups, (8, {"a": 8}), "not applicable", "one host"),
    (pitfalls.judge_bias_types, ({"b": "float32"},), "ok", "in float32"),
    (pitfalls.judge_bias_types, ({"a": "float32", "b": "bfloat16"},), "warning", "1 of 2 are stored as bfloat16"),
    (pitfalls.judge_bias_types, ({},), "not applicable", "no released model"),
    (pitfalls.judge_source, ("texts", False), "problem", "texts does not exist"),
    (lambda: kernel_facts(), (), "ok", "to 1e-07"),
    (lambda: kernel_facts(cuda=True), (), "not applicable", "on CPU only"),
    (lambda: kernel_facts(off=True), (), "warning", "unset ALFB_NATIVE"),
    (lambda: kernel_facts(compiler=None), (), "warning", "no C compiler"),
    (lambda: kernel_facts(loaded=False), (), "warning", "does not make them"),
    (lambda: kernel_facts(difference=0.01), (), "problem", "off by 0.01"),
    (lambda: kernel_facts(difference=float("nan")), (), "problem", "off by nan"),
]


def says(result: Result, words: str) -> bool:
    return words in result.found or words in result.mend


@pytest.mark.parametrize(("judge", "facts", "verdict", "words"), JUDGEMENTS)
def test_facts_get_their_verdict(
    judge: Callable[..., Result], facts: tuple[Any, ...], verdict: str, words: str
) -> None:
    result = judge(*facts)
    assert result.verdict == verdict
    assert says(result, words), result
    assert bool(result.mend) == (verdict in ("warning", "problem"))


@pytest.mark.parametrize("chosen", ["", "eth0", "lo,eth0"])
def test_an_interface_that_is_there_is_no_result(chosen: str) -> None:
    assert judge_chosen("GLOO_SOCKET_IFNAME", chosen, ETH0) is None


@pytest.mark.parametrize("chosen", ["eth", "=eth0", "^lo", "^docker"])
def test_nccl_finds_interfaces_by_the_beginning_of_their_names(chosen: str) -> None:
    assert judge_chosen("NCCL_SOCKET_IFNAME", chosen, ETH0) is None


def verdicts(results: Iterator[Result]) -> dict[str, str]:
    return {result.check: result.verdict for result in results}


OURS = ("0.1.0", "2.13.0", "0.19.8", "5.23.0")


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (Answer("a", versions=OURS), {"host a": "ok"}),
        (Answer("a", error="Permission denied"), {"host a": "problem"}),
        (Answer("a", versions=None), {"host a": "problem"}),
        (Answer("a", versions=("0.1.0", "2.12.0", "0.19.8", "5.23.0")), {"host a": "problem"}),
        (Answer("a", versions=OURS, skew=-90), {"host a": "ok", "clock of a": "warning"}),
    ],
)
def test_a_host_gets_its_verdict(answer: Answer, found: dict[str, str]) -> None:
    assert verdicts(judge_answer(answer, OURS)) == found


def test_versions_that_differ_are_named() -> None:
    (result,) = judge_answer(Answer("a", versions=("0.1.0", "2.12.0", "0.19.8", "5.23.0")), OURS)
    assert result.found == "torch 2.12.0 (here 2.13.0)"


@pytest.mark.parametrize(("remote", "skew"), [(101.0, 0.0), (99.0, -1.0), (107.0, 4.0), (100.0, 0.0), (103.0, 0.0)])
def test_a_clock_read_between_100_and_103_is_off_by(remote: float, skew: float) -> None:
    assert clock_skew(100.0, remote, 103.0) == skew


def put_command(folder: Path, name: str, script: str) -> None:
    """The folder has a command of this name."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


SSH = """
for word; do case "$word" in good|away|alone|silent|late) host=$word;; esac; last=$word; done
case "$host" in
good) sh -c "$last";;
late) echo 1000000000.5; sh -c "$last" | tail -n 1;;
alone) echo "$(date +%s.%N)"; echo "no module" >&2; exit 1;;
silent) exec sleep 60;;
*) echo "first line" >&2; echo "ssh: connect to host $host: No route to host" >&2; exit 255;;
esac
"""


def test_hosts_are_asked_over_ssh_all_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_command(path, "ssh", SSH)
    put_command(path, "pdsh", "")
    monkeypatch.setattr(hosts, "SSH_SECONDS", 2)
    started = time.monotonic()
    results = list(hosts.check_hosts(Case(hosts={"good": 1, "away": 1, "alone": 1, "silent": 1, "late": 1})))
    found = {result.check: result for result in results}
    assert found["hostfile"].verdict == found["pdsh"].verdict == found["host good"].verdict == "ok"
    assert found["host away"].found == "ssh: ssh: connect to host away: No route to host"
    assert found["host alone"].verdict == "problem" and "has no alfb_dist there" in found["host alone"].found
    assert found["host silent"].found == "ssh: no answer within 4 s"
    assert found["host late"].verdict == "ok" and "behind" in found["clock of late"].found
    assert time.monotonic() - started < 60


def test_without_a_hostfile_no_host_is_asked_and_a_bad_one_is_a_problem() -> None:
    assert verdicts(hosts.check_hosts(Case())) == {"hosts": "not applicable"}
    assert verdicts(hosts.check_hosts(Case(bad_hostfile="line 2"))) == {"hostfile": "problem"}


@pytest.mark.parametrize(
    ("script", "verdict", "words"),
    [
        ("echo of 1; echo of 1", "warning", "each process is alone"),
        ("echo of 2; echo of 2", "ok", "met"),
        ("exec sleep 60", "warning", "did not end"),
        ("echo no slots >&2; exit 1", "warning", "fails: no slots"),
    ],
)
def test_mpirun_is_tried(path: Path, monkeypatch: pytest.MonkeyPatch, script: str, verdict: str, words: str) -> None:
    put_command(path, "mpirun", script)
    monkeypatch.setattr(launchers, "MPI_SECONDS", 3)
    result = list(launchers.check_launchers(Case()))[-1]
    assert result.verdict == verdict and words in result.found


def test_a_port_is_taken_while_a_process_listens_on_it() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert not port_is_free(port)
    assert port_is_free(port)


def test_route_to_this_machine_is_loopback() -> None:
    assert route_to("127.0.0.1") == "127.0.0.1"


def test_driver_is_read_from_the_kernel_s_file(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert driver_version(file) is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 12"
    )
    assert driver_version(file) == "580.95.05"


def test_packages_are_those_of_the_installed_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"Requires-Python": ">=3.11"}
    wanted = ["numpy>=2", "torch<1", "no-such-package>=1", 'peft<0; extra == "dev"', 'none; extra == "dev"']
    monkeypatch.setattr(packages.metadata, "metadata", lambda name: about)
    monkeypatch.setattr(packages.metadata, "requires", lambda name: wanted)
    results = list(packages.check_packages(Case()))
    assert verdicts(iter(results)) == {
        "python": "ok",
        "package torch": "problem",
        "package no-such-package": "problem",
        "package peft": "warning",
        "packages": "ok",
    }
    assert results[-1].found.startswith("numpy 2")


def test_a_package_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "PACKAGE", "no-such-package")
    (result,) = packages.check_packages(Case())
    assert result.verdict == "problem" and result.found == "no-such-package is not installed"


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_kernels_that_compute_otherwise_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from alfb_dist.experts import native

    monkeypatch.delenv("ALFB_NATIVE", raising=False)
    (well,) = kernels.check_kernels(Case())
    assert well.verdict == "ok"
    true_call = native._call

    def off(name: str, *arguments: Any) -> None:
        true_call(name, *arguments)
        if name == "backward":
            arguments[-2].mul_(1.001)  # the gradient of the second matrix

    monkeypatch.setattr(native, "_call", off)
    (wrong,) = kernels.check_kernels(Case())
    assert wrong.verdict == "problem"


def test_missing_compiler_and_switch_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALFB_NATIVE", "0")
    (off,) = kernels.check_kernels(Case())
    monkeypatch.delenv("ALFB_NATIVE")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    (none,) = kernels.check_kernels(Case())
    assert "ALFB_NATIVE" in off.mend and "no C compiler" in none.found


def rank(program: str) -> list[str]:
    """A command for `exchange.measure`, told its rank in the environment."""
    return [sys.executable, "-c", f"import os, sys, time\nrank = os.environ['RANK']\n{program}"]


def test_a_process_of_the_exchange_that_fails_is_named_with_its_last_words() -> None:
    program = "if rank == '1': sys.exit('no such device')\ntime.sleep(60)"
    started = time.monotonic()
    assert exchange.measure({}, rank=rank(program), limit=50) == "process 1 ended with 1: no such device"
    assert time.monotonic() - started < 40


def test_an_exchange_that_does_not_end_is_given_up_and_leaves_no_process(tmp_path: Path) -> None:
    program = f"open(os.path.join({str(tmp_path)!r}, rank), 'w').write(str(os.getpid()))\ntime.sleep(60)"
    assert exchange.measure({}, rank=rank(program), limit=3) == "no end within 3 s"
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_an_exchange_without_figures_is_a_problem() -> None:
    assert exchange.measure({}, rank=rank("print('hello')"), limit=50) == "nothing was measured"


@pytest.mark.parametrize(("gpus", "verdict"), [(0, "not applicable"), (1, "not applicable"), (2, "ok")])
def test_nccl_is_measured_between_two_gpus(gpus: int, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []

    def measure(environment: dict[str, str]) -> dict[str, Any]:
        asked.append(environment)
        return MEASURED

    monkeypatch.setattr(exchange, "measure", measure)
    monkeypatch.setattr(exchange, "find_device", lambda: Device(None, "13.0", "580.1", ("H100",) * gpus))
    assert verdicts(exchange.check_exchange(Case())) == {"exchange over gloo": "ok", "exchange over nccl": verdict}
    assert asked == [{"DS_ACCELERATOR": "cpu"}, {"DS_ACCELERATOR": "cuda"}][: 1 + (verdict == "ok")]


def hangs(case: Case) -> Iterator[Result]:
    yield ok("before", "")
    time.sleep(30)


def fails(case: Case) -> Iterator[Result]:
    yield ok("first", "")
    raise KeyError("thing")


def works(case: Case) -> Iterator[Result]:
    yield problem("last", "", "mend")


def test_a_check_that_hangs_or_fails_is_a_problem_and_the_others_go_on() -> None:
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


def case(*overrides: str, hosts: dict[str, int] | None = None) -> Case:
    hosts = hosts or {}
    return Case(load_config(TEST_CONFIG, overrides, world_size=sum(hosts.values()) or None), hosts=hosts)


def config_verdicts(given: Case) -> dict[str, str]:
    results = [r for r in pitfalls.check_configuration(given) if r.verdict in ("warning", "problem")]
    return {result.check.removeprefix("config: "): result.verdict for result in results}


def test_configuration_for_tests_has_no_pitfall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_verdicts(case()) == {}
    assert config_verdicts(case(hosts={"a": 2, "b": 2})) == {}


SOFTMAX = (
    'model.family="mixtral"',
    "model.config={vocab_size=320, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_local_experts=8, "
    "num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2}",
)


@pytest.mark.parametrize(
    ("overrides", "hosts", "found"),
    [
        (SOFTMAX, {}, {"balance.rate": "warning"}),
        ((*SOFTMAX, 'balance.rule="rms"'), {}, {}),
        (("balance.rate=0",), {}, {"balance.rate": "warning"}),
        (("train.steps=20000",), {}, {"balance.zero_at_step": "warning"}),
        (("balance.zero_at_step=60",), {}, {"balance.zero_at_step": "warning"}),
        (("balance.batch_loss_alpha=0.01",), {}, {"auxiliary losses": "warning"}),
        (("deepspeed.zero_optimization.stage=2",), {}, {"accumulation": "warning"}),
        (("deepspeed.managed_gradient_accumulation=false",), {}, {"accumulation": "problem"}),
        (("train.steps=200", "train.checkpoint_interval=0"), {}, {"train.checkpoint_interval": "warning"}),
        (("parallel.ep_degree=4",), {"a": 2, "b": 2}, {"parallel.ep_degree": "warning"}),
        (('data.source=["nowhere", "python-stdlib"]',), {}, {"data.source": "problem"}),
    ],
)
def test_pitfall_of_a_configuration_is_seen(
    overrides: tuple[str, ...],
    hosts: dict[str, int],
    found: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_verdicts(case(*overrides, hosts=hosts)) == found


def test_a_released_model_without_a_mode_and_with_rounded_biases_is_seen(tmp_path: Path) -> None:
    from transformers import AutoConfig

    given = load_config(TEST_CONFIG).model.config
    AutoConfig.for_model("deepseek_v3", **given).save_pretrained(tmp_path)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    save_file({bias: torch.zeros(8, dtype=torch.bfloat16), "x.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    released = case(f'model.path="{tmp_path}"', "model.config={}", f'run.folder="{tmp_path}/runs"')
    assert config_verdicts(released) == {"balance.mode": "warning", "released biases": "warning"}
    assert pitfalls.bias_types(str(tmp_path)) == {bias: "bfloat16"}


def test_steps_of_the_last_run_tell_what_a_crash_costs(tmp_path: Path) -> None:
    given = case(f'run.folder="{tmp_path}"', "train.steps=2000", "train.checkpoint_interval=500")
    assert config_verdicts(given) == {}
    folder = tmp_path / "test-2"
    folder.mkdir()
    lines = ['{"step": 1, "step_seconds": 50.0}', *(f'{{"step": {i}, "step_seconds": 5.0}}' for i in (2, 3))]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    assert config_verdicts(given) == {"train.checkpoint_interval": "warning"}


def test_what_loading_refuses_is_told_line_by_line() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(TEST_CONFIG, ["train.stepz=3", "parallel.ep_degree=3"])
    results = list(pitfalls.check_configuration(Case(refused=refused.value.problems)))
    assert [r.verdict for r in results] == ["problem"] * len(refused.value.problems)
    assert any("did you mean train.steps?" in r.found for r in results)


def test_without_a_configuration_there_are_no_pitfalls() -> None:
    assert verdicts(pitfalls.check_configuration(Case())) == {"config": "not applicable"}


def test_disk_and_memory_are_held_against_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    given = case(f'run.folder="{tmp_path}/a/b"', f'data.cache="{tmp_path}/c"')
    assert given.estimate is not None
    assert list(tmp_path.iterdir()) == []
    runs, data = check_disk(given)
    assert runs.verdict == data.verdict == "ok"
    assert f"{3 * 12 * given.estimate.parameters / 2**20:.1f} MiB needed" in runs.found
    assert "weights, gradients and optimizer" in list(check_limits(given))[-1].found
    big = case("model.config.moe_intermediate_size=2000000000", f'run.folder="{tmp_path}"')
    assert list(check_limits(big))[-1].verdict == next(check_disk(big)).verdict == "problem"


def test_on_gpus_the_memory_of_the_fullest_counts_for_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case()
    assert given.estimate is not None and given.local_ranks == 2
    needed = given.estimate.state_bytes
    free = [needed * 4, needed + 1]
    monkeypatch.setattr(machine, "uses_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (free[i], 0))
    assert list(check_limits(given))[-1].verdict == "warning"
    free[1] = needed - 1
    assert list(check_limits(given))[-1].verdict == "problem"


def test_a_checkpoint_has_as_many_bytes_a_parameter_as_the_disk_check_says(tmp_path: Path) -> None:
    """Held against a save of the product, less what does not grow with the parameters."""
    run = [sys.executable, "-m", "alfb_dist.cli", "train", str(TEST_CONFIG)]
    settings = ["parallel.ep_degree=1", "train.steps=2", "model.config.moe_intermediate_size=512"]
    words = [word for setting in settings for word in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([*run, *words], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=150)
    (save,) = tmp_path.glob("runs/test/checkpoints/step-*")
    parameters = case(*settings).estimate
    assert parameters is not None
    written = sum(file.stat().st_size for file in save.glob("tensors-*"))
    assert written == pytest.approx(12 * parameters.parameters, rel=0.02)
