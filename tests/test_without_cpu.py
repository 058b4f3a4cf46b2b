"""alfb_dist/cpu is optional and has one entry: `from alfb_dist import cpu`. Without its directory plain torch runs."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import alfb_dist

ROOT = Path(__file__).parents[1]
PACKAGE = Path(alfb_dist.__file__).parent

SAMPLE = [
    "tests/moe/test_permute.py",
    "tests/moe/test_experts.py",
    "tests/moe/test_shared_experts.py",
    "tests/moe/test_gate.py",
    "tests/moe/test_dispatch_ranks.py",
    "tests/distributed/test_all_to_all_ranks.py",
    "tests/cli/test_cli.py",
]
"""A minute of the tests that use what cpu replaces. All others outside tests/cpu pass without it too."""


def imports_inside_cpu(source: str) -> Iterator[str]:
    """Yield the modules of cpu that a source imports other than by `from alfb_dist import cpu`."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        yield from (name for name in names if f"{name}.".startswith("alfb_dist.cpu."))


def test_nothing_outside_imports_from_inside_cpu() -> None:
    files = [path for folder in ("alfb_dist", "launch", "tests") for path in (ROOT / folder).rglob("*.py")]
    outside = [path for path in files if "cpu" not in path.relative_to(ROOT).parts]
    assert len(outside) > 100
    assert not [str(path) for path in outside if list(imports_inside_cpu(path.read_text()))]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from alfb_dist.cpu.experts import EXPERTS", ["alfb_dist.cpu.experts"]),
        ("def f():\n    from alfb_dist.cpu import allocator", ["alfb_dist.cpu"]),
        ("import alfb_dist.cpu.build", ["alfb_dist.cpu.build"]),
        ("from alfb_dist import cpu\ncpu.empty((3,), x)", []),
    ],
)
def test_check_for_imports_sees_them(source: str, found: list[str]) -> None:
    assert list(imports_inside_cpu(source)) == found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository without alfb_dist/cpu and tests/cpu."""
    if not (PACKAGE / "cpu").is_dir():
        pytest.skip("this is such a copy")
    target = tmp_path_factory.mktemp("without_cpu") / "repository"
    target.mkdir()
    ignore = shutil.ignore_patterns("cpu", "__pycache__")
    for name in ("alfb_dist", "configs", "docs", "launch", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, target)
    return target


def run(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the copy, which it also imports."""
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    return subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)


def test_without_the_directory_functions_return_none(copy: Path) -> None:
    code = (
        "import sys, alfb_dist; from alfb_dist import cpu; import alfb_dist.moe.parallelize;"
        "assert alfb_dist.cpu is cpu and cpu.expert_mlp(1, x=2) is None and not cpu.has_kernels();"
        "assert not [name for name in sys.modules if name.startswith('alfb_dist.cpu')]; print(alfb_dist.__file__)"
    )
    done = run(copy, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(copy / "alfb_dist" / "__init__.py")


def test_an_error_inside_the_directory_is_not_hidden(copy: Path, tmp_path: Path) -> None:
    broken = tmp_path / "alfb_dist"
    shutil.copytree(copy / "alfb_dist", broken)
    (broken / "cpu").mkdir()
    (broken / "cpu" / "__init__.py").write_text("import no_such_module\n")
    done = run(tmp_path, "-c", "from alfb_dist import cpu")
    assert "No module named 'no_such_module'" in done.stderr


@pytest.mark.timeout(900)
def test_other_tests_pass_without_the_directory(copy: Path) -> None:
    done = run(copy, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SAMPLE)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", ["train --set train.steps=2 --set parallel.ep_degree=1", "doctor"])
def test_commands_run_without_the_directory(copy: Path, command: str) -> None:
    name, *options = command.split()
    done = run(copy, "-m", "alfb_dist.cli", name, "configs/test.toml", *options)
    assert done.returncode == 0, done.stdout + done.stderr
