"""Hosts that differ are refused before a run starts, with the fact, the values and the hosts."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hosts.cluster import Hosts

from alfb_dist.config import ConfigError, provenance
from alfb_dist.config.provenance import differences, facts
from alfb_dist.distributed.launch.preflight import check_hosts
from alfb_dist.training import run

ROOT = Path(__file__).parents[2]


def test_facts_that_are_the_same_are_no_difference() -> None:
    assert differences([("a", {"torch": "2"}), ("a", {"torch": "2"}), ("b", {"torch": "2"})], "fix") == []


def test_a_difference_names_the_fact_its_values_and_who_has_them() -> None:
    known = [("a", {"x": 1, "y": 0}), ("a", {"x": 1, "y": 0}), ("b", {"x": 2, "y": 0}), ("c", {"y": 0})]
    assert differences(known, "make it the same") == [
        "x is 1 on a, but 2 on b, but missing on c; make it the same",
    ]


def test_facts_hold_versions_and_change_with_any_source_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"python", "torch", "deepspeed", "transformers", "alfb_dist"} <= facts().keys()
    copy = tmp_path / "alfb_dist"
    shutil.copytree(Path(provenance.__file__).parents[1], copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "__file__", str(copy / "config" / "provenance.py"))
    same = facts()
    assert same == facts()
    with (copy / "cpu" / "csrc" / "experts.c").open("a") as source:
        source.write("\n")
    assert {name for name, value in facts().items() if same[name] != value} == {"hash of alfb_dist's files"}


# Over ssh, which is a script here; on real hosts below.


def fake_ssh(folder: Path, body: str) -> list[str]:
    """Return the command of a program that is called like ssh: options, host, command."""
    script = folder / "ssh"
    script.write_text(f'#!/bin/sh\nshift 4; host="$1"; shift\n{body}\n')
    script.chmod(0o755)
    return [str(script)]


def refusal(ssh: list[str], **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check_hosts(["a", "b"], **{"port": 0, "ssh": ssh, **options})
    return str(error.value).splitlines()


def test_hosts_that_answer_alike_pass(tmp_path: Path) -> None:
    check_hosts(["a", "b"], port=0, ssh=fake_ssh(tmp_path, 'sh -c "$*"'))


def test_hosts_that_do_not_answer_are_all_reported(tmp_path: Path) -> None:
    refused = fake_ssh(tmp_path, 'echo "ssh: connect to $host: refused" >&2; exit 255')
    assert refusal(refused) == [
        "a cannot be reached over ssh without a password: ssh: connect to a: refused",
        "b cannot be reached over ssh without a password: ssh: connect to b: refused",
    ]
    assert refusal(fake_ssh(tmp_path, "exec sleep 100"), timeout_seconds=1)[0] == "a did not answer over ssh within 1 s"
    assert "cannot be run here" in refusal([str(tmp_path / "none")])[0]


def test_a_host_without_this_python_is_reported(tmp_path: Path) -> None:
    only_b = fake_ssh(tmp_path, 'if [ $host = b ]; then set -- "$(echo "$*" | sed s/python/pyth0n/g)"; fi; sh -c "$*"')
    (message,) = refusal(only_b)
    assert message.startswith(f"b cannot run {sys.executable} with alfb_dist (") and "No such file" in message


def test_a_busy_port_is_reported_only_on_the_first_host(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (message,) = refusal(fake_ssh(tmp_path, 'sh -c "$*"'), port=port)
    assert message.startswith(f"port {port} on a is not free (") and "in use" in message
    check_hosts(["a", "b"], port=port, ssh=fake_ssh(tmp_path, 'sh -c "$*"'))


# When ranks meet.


def start_differently(folder: str, what: str) -> str:
    """Start a run on ranks that differ in one thing, and return this rank's error."""
    import torch.distributed as dist
    from support.train_runs import config_of

    rank = dist.get_rank()
    settings: list[str] = []
    if what == "versions" and rank == 1:
        provenance.versions = lambda: {**true_versions(), "torch": "2.12.0"}  # type: ignore[attr-defined]
    if what == "settings" and rank == 1:
        settings = ["balance.rate=0.5"]
    if what == "data" and rank == 1:
        run._open_data = lambda *given: other_data(*true_open_data(*given))
    if what == "folder" and rank == 1:
        true_exists = Path.exists
        Path.exists = lambda path: not path.name.startswith(".seen") and true_exists(path)  # type: ignore
    with pytest.raises(ConfigError) as error:
        run.start(config_of(Path(folder), *settings))
    return str(error.value)


true_versions = provenance.versions  # type: ignore[attr-defined]
true_open_data = run._open_data


def other_data(train: Any, validation: Any) -> tuple[Any, Any]:
    validation.token_file.fingerprint = "other"
    return train, validation


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("versions", f"torch is '{true_versions()['torch']}' on {{host}}, but '2.12.0' on {{host}}; "),
        ("data", "{folder}/cache/"),
        ("folder", "rank 1: {host} does not see what the first rank writes to {folder}/runs/test: put run.folder on"),
        ("settings", "balance.rate is 0.01 on {host}, but 0.5 on {host}; make it the same on every host"),
    ],
)
def test_ranks_that_differ_are_all_refused_with_both_values(
    ranks: Any, tmp_path: Path, what: str, expected: str
) -> None:
    messages = ranks(2, start_differently, str(tmp_path), what)
    assert messages[0] == messages[1]
    assert messages[0].startswith(expected.format(host=socket.gethostname(), folder=tmp_path))
    assert len(messages[0].splitlines()) == 1
    if what == "data":
        assert "validation.tokens is '" in messages[0] and "but 'other' on" in messages[0]
    assert not list(tmp_path.glob("runs/test/*"))


# On hosts in namespaces.


def launch(hosts: Hosts, folder: Path, hostfile: str, *words: str) -> list[str]:
    """Return the lines with which `alfb launch` on host1 refuses this hostfile."""
    (folder / "hosts").write_text(hostfile)
    command = [sys.executable, "-m", "alfb_dist.cli", "launch", str(ROOT / "configs" / "test.toml"), *words]
    done = hosts.run("host1", [*command, "--hostfile", str(folder / "hosts"), "--set", "parallel.ep_degree=4"])
    assert done.returncode == 78, done.stdout + done.stderr
    assert done.stdout == ""
    return done.stderr.removeprefix("alfb: ").splitlines()


TWO = "host1 slots=2\nhost2 slots=2\n"


@pytest.mark.parametrize(
    ("hostfile", "expected"),
    [
        ("host1 slots=2\nhost2 slotz=2\n", ["line 2", "'host2 slotz=2'", "slots="]),
        ("host1 slots=2\nhost2 slots=0\n", ["line 2", "'host2 slots=0'"]),
        ("host1 slots=2\nhost1 slots=2\n", ["line 2", "host1", "twice"]),
        ("# nobody\n", ["no host"]),
        ("host1 slots=2\nhost9 slots=2\n", ["host9", "not known"]),
    ],
)
def test_a_wrong_hostfile_is_refused_with_its_line(
    hosts: Hosts, tmp_path: Path, hostfile: str, expected: list[str]
) -> None:
    (line,) = launch(hosts, tmp_path, hostfile)
    assert all(words in line for words in expected), line


def test_a_host_that_is_cut_off_is_named(hosts: Hosts, tmp_path: Path) -> None:
    hosts.link("host2", up=False)
    try:
        (line,) = launch(hosts, tmp_path, TWO)
    finally:
        hosts.link("host2", up=True)
    assert line.startswith("host2 cannot be reached over ssh") or line.startswith("host2 did not answer"), line


def test_a_port_that_another_process_has_is_named(hosts: Hosts, tmp_path: Path) -> None:
    code = "import socket; s = socket.create_server(('', 29600)); print('up', flush=True); s.accept()"
    other = hosts.popen("host1", [sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == "up\n"
        (line,) = launch(hosts, tmp_path, TWO, "--master-port", "29600")
    finally:
        other.kill()
        other.communicate()
    assert line.startswith("port 29600 on host1 is not free ("), line


def test_other_versions_on_one_host_are_named_with_both_values(hosts: Hosts, tmp_path: Path) -> None:
    """On host2 a file with another version is mounted over transformers' metadata."""
    from importlib import metadata

    files = metadata.distribution("transformers").files
    assert files is not None
    real = next(Path(str(f.locate())) for f in files if f.name == "METADATA")
    version = metadata.version("transformers")
    other = tmp_path / "METADATA"
    other.write_text(real.read_text().replace(f"\nVersion: {version}\n", "\nVersion: 5.0.1\n", 1))
    assert hosts.run("host2", ["mount", "--bind", str(other), str(real)]).returncode == 0
    try:
        (line,) = launch(hosts, tmp_path, TWO)
    finally:
        hosts.run("host2", ["umount", str(real)])
    assert line == f"transformers is '{version}' on host1, but '5.0.1' on host2; install the same on every host"


def test_the_answer_of_a_host_is_one_line_of_json(hosts: Hosts) -> None:
    answer = hosts.run("host2", [sys.executable, "-m", "alfb_dist.distributed.launch.preflight", "0"], cwd=str(ROOT))
    found = json.loads(answer.stdout)
    assert found.pop("clock") > 1.7e9  # seconds since 1970
    assert found == {**facts(), "port_error": ""}
