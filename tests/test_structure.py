"""No file above 400 lines and no function above 60, and no drawer for what has no home."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

import alfb_dist

PACKAGE = Path(alfb_dist.__file__).parent
FILES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "launch").glob("*.py")])
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def short(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


@pytest.mark.parametrize("path", FILES, ids=short)
def test_file_is_short(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= MAX_FILE_LINES, f"{short(path)} has {lines} lines"


def long_functions(source: str) -> list[str]:
    return [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


@pytest.mark.parametrize("path", FILES, ids=short)
def test_functions_are_short(path: Path) -> None:
    assert long_functions(path.read_text()) == []


def test_length_of_a_function_is_seen() -> None:
    body = "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    assert long_functions(f"def short():\n{body}") == []
    assert long_functions(f"class A:\n  def long(self):\n{body}    x = 2\n") == ["long (61 lines)"]


def test_no_file_is_a_drawer() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}
    assert not [short(path) for path in FILES if path.stem in drawers or path.parent.name in drawers]


@pytest.mark.parametrize("path", FILES, ids=short)
def test_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_wheel_holds_every_file_of_the_package() -> None:
    """setuptools takes the modules of directories with an __init__.py, and what package-data names."""
    packages = {path.parent for path in PACKAGE.rglob("__init__.py")}
    assert {path.parent for path in PACKAGE.rglob("*.py")} <= packages
    setuptools = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    named = {path for pattern in setuptools["package-data"]["alfb_dist"] for path in PACKAGE.glob(pattern)}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert named == others
