"""The files that describe the images and, if ALFB_IMAGE names a built one, how it runs.

`make image-test` builds the image and runs all of this.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.containers import Container, container, first_process, go, join_network, wait_for

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
COMPILERS = ("gcc", "g++", "cc", "clang", "build-essential", "libc6-dev")

needs_image = pytest.mark.skipif("ALFB_IMAGE" not in os.environ, reason="`make image-test` builds the image")


def stages() -> dict[str, list[str]]:
    """The instructions of each stage of the Dockerfile by its name, FROM first, without comments."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    instructions = "\n".join(lines).replace("\\\n", " ").splitlines()
    found: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, instructions)):
        if start := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[start[2]] = []
        if found:
            found[list(found)[-1]].append(line)
    return found


def lineage(name: str) -> list[str]:
    """The instructions of a stage and of the stages that it starts from."""
    known = stages()
    source = known[name][0].split()[1]
    return (lineage(source) if source in known else []) + known[name]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_image_has_an_init_and_an_unprivileged_user(target: str) -> None:
    own = stages()[target]
    users = [line.split()[1] for line in own if line.startswith("USER ")]
    assert users == ["1000:1000"]
    assert 'ENTRYPOINT ["tini", "--", "alfb"]' in lineage(target)


def test_cpu_image_gets_no_compiler_and_cuda_one_for_triton() -> None:
    assert not [line for line in lineage("cpu") if set(COMPILERS) & set(line.split())]
    assert [line for line in lineage("cuda") if "gcc" in line.split()]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_sources_come_after_dependencies(target: str) -> None:
    """Changed sources do not invalidate the layers of the dependencies."""
    environment = "\n".join(lineage(f"{target}-environment"))
    assert "alfb_dist" not in environment and "COPY pyproject.toml" in environment
    own = stages()[target]
    dependencies = next(i for i, line in enumerate(own) if f"--from={target}-environment" in line)
    assert dependencies < next(i for i, line in enumerate(own) if "from=wheel" in line)


def test_only_pyproject_names_versions() -> None:
    for file in ("Dockerfile", "build.sh"):
        assert not re.search(r"[=<>~]=\s*\d", (ROOT / "docker" / file).read_text()), file


@pytest.mark.parametrize("names", [(), ("torch",)])
def test_requirements_are_those_of_pyproject(names: tuple[str, ...]) -> None:
    script = ROOT / "docker" / "requirements.py"
    done = subprocess.run([sys.executable, script, *names], cwd=ROOT, check=True, capture_output=True, text=True)
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["mpi"]
    assert done.stdout.splitlines() == [w for w in wanted if not names or w.startswith("torch>")]


def test_build_context_holds_only_the_named_files() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    copied = {word for stage in stages().values() for line in stage for word in line.split()[1:-1] if "COPY" in line}
    copied -= {word for word in copied if word.startswith(("--", "/", "./"))}
    assert {f"!{name}" for name in copied} == {line for line in lines if line.startswith("!")}


FAKES = {
    "debootstrap": 'for last; do :; done; mkdir -p "$last/usr/bin" "$last/etc/ssl/certs"',
    "buildah": 'echo "$*" >> "$LOG"; case "$1" in inspect) exit 1;; from) echo made;; esac',
    "cp": "",
}


def test_build_removes_only_what_it_created(tmp_path: Path) -> None:
    """The directory with wheels, which the script names last, must stay."""
    for directory in ("bin", "wheels", "temporary"):
        (tmp_path / directory).mkdir()
    for name, script in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "wheels" / "torch.whl").touch()
    settings = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "temporary")}
    settings |= {"PIP_FIND_LINKS": str(tmp_path / "wheels"), "LOG": str(tmp_path / "log")}
    environment = {name: value for name, value in os.environ.items() if name != "BASE"} | settings
    subprocess.run([ROOT / "docker" / "build.sh", "cpu"], env=environment, check=True, timeout=60)
    assert (tmp_path / "wheels" / "torch.whl").exists()
    assert list((tmp_path / "temporary").iterdir()) == []
    *_, build = (tmp_path / "log").read_text().splitlines()
    assert build.startswith("bud ") and f"--volume {tmp_path}/wheels:{tmp_path}/wheels:ro" in build


def test_two_nodes_of_compose_are_one_run_and_hold_no_secret() -> None:
    services = COMPOSE["services"]
    assert COMPOSE["networks"]["ranks"]["internal"]
    for number, (name, service) in enumerate(services.items()):
        assert service["hostname"] == name == f"node{number}"
        words = service["command"].split()
        assert words[words.index("--node-rank") + 1] == str(number)
        assert words[words.index("--nodes") + 1] == str(len(services))
        assert {volume.split(":")[0] for volume in service["volumes"]} == set(COMPOSE["volumes"])
        assert not re.search("key|token|secret|password", json.dumps(service), re.IGNORECASE)


@pytest.fixture(scope="module")
def image() -> Iterator[Container]:
    with container(os.environ["ALFB_IMAGE"]) as made:
        yield made


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    file = tmp_path / "hosts"
    file.write_text("127.0.0.1 localhost node0\n")
    return file


def metrics(image: Container, run: str) -> list[dict[str, Any]]:
    file = image.home / "runs" / run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@needs_image
def test_image_holds_no_compiler_and_no_secret(image: Container, hosts: Path) -> None:
    assert image.run(["id", "-u"], hosts, entry=False) == (0, "1000\n")
    for name in ("gcc", "g++", "cc", "c++", "clang", "ld", "as"):
        assert image.run(["sh", "-c", f"command -v {name}"], hosts, entry=False)[0] != 0, name
    assert not [pair for pair in image.config["Env"] if re.search("KEY|TOKEN|SECRET|PASSWORD", pair.split("=")[0])]
    directories = [str(image.root / name) for name in ("home", "root", "etc")]
    private = subprocess.run(
        ["grep", "-rlI", "PRIVATE KEY-", *directories], capture_output=True, text=True, check=False
    )
    assert private.stdout == ""
    python = ["python", "-c", "import torch; print(torch.version.cuda)"]
    assert image.run(python, hosts, entry=False) == (0, "None\n")


@needs_image
def test_image_trains_on_two_ranks_through_the_deepspeed_launcher(image: Container, hosts: Path) -> None:
    code, output = image.run(["launch", "configs/test.toml", "--ranks", "2"], hosts)
    assert code == 0, output
    found = metrics(image, "test")
    assert [line["step"] for line in found if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["val_loss"] < 5.7


@needs_image
def test_term_to_process_1_saves_a_checkpoint_and_exits_with_75(image: Container, hosts: Path) -> None:
    settings = ["train.steps=100000", "train.checkpoint_interval=0", "run.name=long"]
    words = ["launch", "configs/test.toml", "--ranks", "2", *(word for s in settings for word in ("--set", s))]
    process = image.start(words, hosts)
    go(process)
    wait_for(lambda: len(metrics(image, "long")) > 3, process)
    init = first_process(process)
    assert Path(init.cmdline()[0]).name == "tini"
    init.terminate()
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 75, output
    (save,) = (image.home / "runs" / "long" / "checkpoints").glob("step-*")
    assert int(save.name.removeprefix("step-")) == metrics(image, "long")[-1]["step"]
    code, output = image.run(["checkpoint", "verify", str(Path("runs/long/checkpoints") / save.name)], hosts)
    assert (code, output.strip()) == (0, f"runs/long/checkpoints/{save.name}: undamaged")


@needs_image
def test_nodes_of_compose_train_together_and_save_when_one_is_terminated(image: Container, hosts: Path) -> None:
    addresses = [f"10.79.0.{number + 1}" for number in range(2)]
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{a} node{i}\n" for i, a in enumerate(addresses)))
    started = [
        image.start(service["command"].split(), hosts, name=name, network=True)
        for name, service in COMPOSE["services"].items()
    ]
    try:
        join_network(started, addresses)
        for process in started:
            go(process)
        wait_for(lambda: len(metrics(image, "demo")) > 3, started[0])
        first_process(started[1]).terminate()
        outputs = [process.communicate(timeout=150)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [75, 75], outputs
    assert metrics(image, "demo")[-1]["tokens"] == metrics(image, "demo")[-1]["step"] * 4096
    assert len(list((image.home / "runs" / "demo" / "checkpoints").glob("step-*"))) == 1
