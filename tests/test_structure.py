"""No file above 400 lines and no function above 60, and no drawer for what has no home."""

from __future__ import annotations

import ast
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
