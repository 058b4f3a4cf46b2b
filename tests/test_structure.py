"""No file above 400 lines, no function above 60, no module without a docstring or a topic; the wheel is complete."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import alfb_dist

PACKAGE = Path(alfb_dist.__file__).parent
FILES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "launch").glob("*.py")])
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def short(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def test_files_are_short() -> None:
    lines = {short(path): path.read_text().count("\n") for path in FILES}
    assert {path: count for path, count in lines.items() if count > MAX_FILE_LINES} == {}


def long_functions(source: str) -> list[str]:
    return [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def test_functions_are_short() -> None:
    found = {short(path): long_functions(path.read_text()) for path in FILES}
    assert {path: functions for path, functions in found.items() if functions} == {}


def test_long_functions_are_found() -> None:
    body = "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    assert long_functions(f"def short():\n{body}") == []
    assert long_functions(f"class A:\n  def long(self):\n{body}    x = 2\n") == ["long (61 lines)"]


def test_names_of_modules_name_a_topic() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}
    assert [short(path) for path in FILES if path.stem in vague or path.parent.name in vague] == []


def test_modules_have_docstrings() -> None:
    assert [short(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_wheel_holds_every_file_of_the_package() -> None:
    """setuptools includes the modules in directories with an __init__.py, and the files that package-data names."""
    packages = {path.parent for path in PACKAGE.rglob("__init__.py")}
    assert {path.parent for path in PACKAGE.rglob("*.py")} <= packages
    setuptools = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    named = {path for pattern in setuptools["package-data"]["alfb_dist"] for path in PACKAGE.glob(pattern)}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert named == others
