"""The command line of each launcher that `alfb launch` would start, and its refusals before anything starts."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from alfb_dist.cli import main
from alfb_dist.config import ConfigError
from alfb_dist.distributed.launch import commands, environment
from alfb_dist.distributed.launch import plan as planning
from alfb_dist.distributed.launch.hostfile import address_of, address_toward, read_hostfile

CONFIG = str(Path(__file__).parents[2] / "configs" / "test.toml")
TRAIN = ["alfb_dist.cli", "train", CONFIG]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PET_", "OMPI_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(planning, "DEEPSPEED_HOSTFILE", Path("/nowhere/hostfile"))


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("# two hosts\n127.0.0.1 slots=2\n\n127.0.0.2   slots=2  # the other\n")
    return str(path)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Return the command that these words would start, its first word without the directory."""
    assert main(["launch", CONFIG, "--dry-run", *words]) == 0
    found = shlex.split(capsys.readouterr().out)
    return [Path(found[0]).name, *found[1:]]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["launch", CONFIG, "--dry-run", *words]) == 78
    return capsys.readouterr().err


def test_deepspeed_here(capsys: pytest.CaptureFixture[str]) -> None:
    words = planned(capsys, "--ranks", "4", "--master-port", "29777", "--set", "optimizer.lr=0.5")
    own = ["--log_level", "error", "--num_accelerators", "4", "--master_port", "29777", "--no_local_rank", "--module"]
    assert words == ["deepspeed", *own, *TRAIN, "--set", "optimizer.lr=0.5"]


def test_torchrun_here_and_on_one_of_several_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    here = planned(capsys, "--with", "torchrun", "--master-port", "29777")
    meet = ["--master-addr", "127.0.0.1", "--master-port", "29777"]
    assert here == ["torchrun", *"--nnodes 1 --node-rank 0 --nproc-per-node 2".split(), *meet, "-m", *TRAIN]
    there = planned(capsys, *"--with torchrun --ranks 4 --nodes 2 --node-rank 1 --master-addr node1".split())
    assert there[1:7] == "--nnodes 2 --node-rank 1 --nproc-per-node 2".split()
    assert there[7:11] == "--master-addr node1 --master-port 29500".split()


def test_mpirun_here(capsys: pytest.CaptureFixture[str]) -> None:
    words = planned(capsys, "--with", "mpirun", "--launcher-args", "--mca btl self,tcp")
    assert words[0] == "mpirun"
    assert words[words.index("-n") + 1] == "2"
    own = ["--mca", "btl", "self,tcp", sys.executable, "-m"]
    assert words[-len(own) - len(TRAIN) :] == [*own, *TRAIN]


@pytest.mark.skipif(not Path("/usr/bin/pdsh").exists(), reason="pdsh is not installed")
def test_deepspeed_over_hosts(capsys: pytest.CaptureFixture[str], hostfile: str) -> None:
    words = planned(capsys, "--hostfile", hostfile)
    assert words[words.index("--hostfile") + 1] == hostfile
    assert words[words.index("--launcher") + 1] == "pdsh"
    assert "--num_accelerators" not in words


def test_mpirun_over_hosts_exports_variables_but_no_secret(
    capsys: pytest.CaptureFixture[str], hostfile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    monkeypatch.setenv("HF_TOKEN", "canary")
    monkeypatch.setenv("MASTER_ADDR", "stale")
    words = planned(capsys, "--with", "mpirun", "--hostfile", hostfile)
    assert words[words.index("-n") + 1] == "4"
    exported = {words[i + 1] for i, word in enumerate(words) if word == "-x"}
    assert {"NCCL_DEBUG", "PATH", "MASTER_ADDR=127.0.0.1"} <= exported
    assert not {"WANDB_API_KEY", "HF_TOKEN"} & exported
    assert words[words.index("btl") + 1] == "self,tcp" and words[words.index("coll") + 1] == "^han"
    own = planned(capsys, "--with", "mpirun", "--hostfile", hostfile, "--launcher-args", "--mca btl ^sm")
    assert own.count("btl") == 1 and own[own.index("btl") + 1] == "^sm"


@pytest.mark.parametrize("given", [(), ("--launcher-args", "--mca btl_tcp_if_include 10.0.0.0/8")])
def test_openmpi_over_hosts_takes_the_interface_that_leads_to_them(
    capsys: pytest.CaptureFixture[str], hostfile: str, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...]
) -> None:
    monkeypatch.setattr(commands, "executable", lambda name, advice: name)
    monkeypatch.setattr(commands, "interface_of", lambda address: "ib0")
    words = planned(capsys, "--with", "openmpi", "--hostfile", hostfile, *given)
    arguments = words[words.index("--launcher_args") + 1].split()
    included = arguments[arguments.index("btl_tcp_if_include") + 1]
    assert arguments.count("btl_tcp_if_include") == 1 and included == ("10.0.0.0/8" if given else "ib0")


def test_srun_takes_the_tasks_of_the_allocation(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    words = planned(capsys, "--with", "srun")
    assert words[:3] == ["srun", "--ntasks", "4"]


def test_a_deepspeed_file_is_passed_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_clipping": 0.5}')
    words = planned(capsys, "--deepspeed", "--deepspeed_config", str(path))
    assert words[-4:] == [CONFIG, "--deepspeed", "--deepspeed_config", str(path)]


REFUSALS = {
    "ranks that do not divide": (("--ranks", "3"), r"ranks (3)"),
    "no rank": (("--ranks", "0"), "--ranks (0) must be at least 1"),
    "nodes without torchrun": (("--nodes", "2"), "--nodes (2) is for --with torchrun"),
    "node rank": ("--with torchrun --nodes 2 --node-rank 2".split(), "--node-rank (2) must be"),
    "no master": ("--with torchrun --ranks 4 --nodes 2 --node-rank 1".split(), "--master-addr"),
    "uneven nodes": ("--with torchrun --ranks 2 --nodes 4 --master-addr a".split(), "--ranks (2) must be divisible"),
    "hostfile of torchrun": ("--with torchrun --hostfile x".split(), "takes no --hostfile"),
    "missing hostfile": (("--hostfile", "/nowhere/x"), "--hostfile /nowhere/x: cannot be read"),
    "openmpi without hosts": (("--with", "openmpi"), "--with mpirun"),
    "no srun": (("--with", "srun"), "srun is not installed"),
    "restarts": (("--max-restarts", "-1"), "--max-restarts (-1) must be at least 0"),
    "configuration": (("--set", "train.stepz=1"), "did you mean train.steps?"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_launch_that_cannot_start_is_refused_with_the_reason(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, reason = REFUSALS[case]
    assert reason in refused(capsys, *words)


def test_taken_port_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"--master-port ({port}) cannot be used" in refused(capsys, "--master-port", port)


def test_other_ranks_than_slots_are_refused(capsys: pytest.CaptureFixture[str], hostfile: str) -> None:
    words = ("--with", "mpirun", "--hostfile", hostfile)
    assert "--ranks (2) must equal the slots of the hostfile (4)" in refused(capsys, *words, "--ranks", "2")


def test_groups_that_would_span_hosts_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("127.0.0.1 slots=3\n127.0.0.2 slots=1\n")
    words = ("--with", "mpirun", "--hostfile", str(path), "--set", "parallel.expert_placement=node")
    assert "such as ranks 2-3 (1 on 127.0.0.1, 1 on 127.0.0.2)" in refused(capsys, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node1 slots=2\nnode1 slots=2\n", r"line 2: node1 is listed twice"),
        ("node1\n", r"line 1 \('node1'\): must be a host and its number of ranks"),
        ("node1 slots=0\n", r"line 1 .*must be"),
        ("# nothing\n", "lists no host"),
    ],
)
def test_hostfile_mistakes_are_named_by_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_hostfile(path)


def test_hosts_are_read_in_the_files_order(hostfile: str) -> None:
    assert list(read_hostfile(Path(hostfile)).items()) == [("127.0.0.1", 2), ("127.0.0.2", 2)]


def test_address_toward_this_host_alone_is_a_loopback_address() -> None:
    assert address_toward(["127.0.0.1"]) == "127.0.0.1"
    assert address_toward([]) == "127.0.0.1"


def test_a_host_may_be_known_to_ssh_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh_config").write_text("Host gpu-one\n  HostName 127.0.0.9\n")
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", f"-F {tmp_path}/ssh_config")
    assert address_of("gpu-one") == "127.0.0.9"
    with pytest.raises(ConfigError, match=r"gpu-two is not known here .*: fix its name or the hostfile"):
        address_of("gpu-two")


def test_mpirun_gets_the_ssh_options_of_pdsh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F mine")
    monkeypatch.delenv("PRTE_MCA_plm_ssh_args", raising=False)
    assert environment.environment_with_exports("10.0.0.7")["PRTE_MCA_plm_ssh_args"] == "-F mine"
    monkeypatch.setenv("PRTE_MCA_plm_ssh_args", "-F theirs")
    assert environment.environment_with_exports("10.0.0.7")["PRTE_MCA_plm_ssh_args"] == "-F theirs"


def test_a_users_file_of_exports_for_the_deepspeed_launcher_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    written = Path(environment.environment_with_exports("10.0.0.7")["DS_ENV_FILE"]).read_text()
    assert "GLOO_SOCKET_IFNAME=eth9\n" in written and "MASTER_ADDR=10.0.0.7\n" in written
    (tmp_path / ".deepspeed_env").write_text("A=b\n")
    assert "DS_ENV_FILE" not in environment.environment_with_exports("10.0.0.7")
