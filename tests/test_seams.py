"""docs/seams.md lists each place that touches what torch, DeepSpeed or transformers do not promise, and no other."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import alfb_dist

PACKAGE = Path(alfb_dist.__file__).parent
ROOT = PACKAGE.parent
whole_package = pytest.mark.skipif(not (PACKAGE / "cpu").is_dir(), reason="the pages describe the package with cpu")
PAGE = (ROOT / "docs" / "seams.md").read_text()
WORDS = set(re.findall(r"\w+", PAGE))

UPSTREAM = {"torch", "deepspeed", "transformers"}
Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every file of the package, by its path in it, parsed."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text())


def places(text: str) -> set[tuple[str, str]]:
    """Every `file:name` of a page."""
    return set(re.findall(r"`([\w/]+\.py):([\w.]+)`", text))


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """The dotted names of functions, methods and classes."""
    for node in body:
        if isinstance(node, Scope):
            yield prefix + node.name
            yield from definitions(node.body, f"{prefix}{node.name}.")


@whole_package
@pytest.mark.parametrize("page", ["architecture.md", "seams.md"])
def test_places_of_a_page_exist(page: str) -> None:
    missing = []
    for file, name in sorted(places((ROOT / "docs" / page).read_text())):
        path = (ROOT if file.startswith("tests/") else PACKAGE) / file
        if not path.is_file() or name not in definitions(ast.parse(path.read_text()).body):
            missing.append(f"{file}:{name}")
    assert not missing


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def own_names(tree: ast.Module) -> set[str]:
    """Names that a file gives to its functions, classes and variables and to its objects' attributes."""
    nodes = list(ast.walk(tree))
    names = {node.name for node in nodes if isinstance(node, Scope)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute) and root_of(node) in ("self", "cls")}


def root_of(node: ast.expr) -> str:
    """The name that a chain of attributes and subscripts begins with; "super" of super(), "" of anything else."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super":
        return "super"
    return node.id if isinstance(node, ast.Name) else ""


def private_names(tree: ast.Module) -> set[str]:
    """Private names of others: attributes, imports, and strings that are keys or arguments of getattr and its like."""
    own, found = own_names(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = node.attr
            if root_of(node) in sys.stdlib_module_names or (name in own and root_of(node) != "super"):
                name = ""
            found.add(name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != PACKAGE.name:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Subscript):
            found |= strings(node.slice) - own
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            found |= strings(*node.args[1:2]) - own
    return {name for name in found if is_private(name)}


def strings(*values: ast.expr) -> set[str]:
    """The string literals among these, of formatted ones the beginning."""
    firsts = [v.values[0] if isinstance(v, ast.JoinedStr) and v.values else v for v in values]
    return {str(first.value) for first in firsts if isinstance(first, ast.Constant)}


def test_private_names_are_on_the_page() -> None:
    assert not {f"{file}: {name}" for file, tree in modules() for name in private_names(tree) if name not in WORDS}


def imported(tree: ast.Module) -> set[str]:
    """The names under which a file has something of torch, DeepSpeed or transformers."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] in UPSTREAM}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UPSTREAM:
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def touches(node: ast.AST, theirs: set[str]) -> bool:
    """Whether this is a hook, a patch, a class swap, a registration, or a class under which torch's functions run."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name = node.func.attr
        hooks = name.startswith("register_") and name.endswith("_hook")
        return hooks or name == "MethodType" or (name == "register" and root_of(node.func) in theirs)
    if isinstance(node, ast.Assign):
        held = [target for target in node.targets if isinstance(target, ast.Attribute | ast.Subscript)]
        return any(root_of(t) in theirs or (isinstance(t, ast.Attribute) and t.attr == "__class__") for t in held)
    return isinstance(node, ast.ClassDef) and "TorchFunctionMode" in map(root_of, node.bases)


def sites(tree: ast.Module) -> set[str]:
    """The functions and classes of a file that touch something of others, by the outermost name."""
    theirs = imported(tree)
    return {
        node.name
        for node in tree.body
        if isinstance(node, Scope) and any(touches(inner, theirs) for inner in ast.walk(node))
    }


def test_hooks_patches_and_class_swaps_are_on_the_page() -> None:
    named = {(file, name.split(".")[0]) for file, name in places(PAGE)}
    assert not {f"{file}:{name}" for file, tree in modules() for name in sites(tree) if (file, name) not in named}


def variables(tree: ast.Module) -> set[str]:
    """Names in capitals in a file that reads or sets the environment."""
    if not any(isinstance(node, ast.Attribute) and node.attr == "environ" for node in ast.walk(tree)):
        return set()
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {w for w in words if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Za-z0-9]+)+|CC|RANK|NETRC|PATH", w)}


def test_environment_variables_are_on_the_page() -> None:
    assert not {f"{file}: {name}" for file, tree in modules() for name in variables(tree) if name not in WORDS}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch._grouped_mm(a, b)", {"_grouped_mm"}),
        ("from deepspeed.utils import groups\ngroups._GROUP[name] = g", {"_GROUP"}),
        ("group._get_backend(d).options._timeout", {"_get_backend", "_timeout"}),
        ("getattr(module, '_func', None)", {"_func"}),
        ("vars(p)['_mapping']", {"_mapping"}),
        ("getattr(model, f'_keys_{kind}')", {"_keys_"}),
        ("from torch import _C", {"_C"}),
        ("super()._apply(f)", {"_apply"}),
        ("self._mine = 1\nother._mine", set()),
        ("import sys\nsys._getframe()", set()),
    ],
)
def test_private_names_are_seen_in_every_form(source: str, found: set[str]) -> None:
    assert private_names(ast.parse(source)) == found


@pytest.mark.parametrize(
    "source",
    [
        "def f(module):\n    module.register_forward_hook(g)",
        "def f(gate):\n    gate.__class__ = type('B', (), {})",
        "def f(engine):\n    engine.step = types.MethodType(g, engine)",
        "class f(TorchFunctionMode):\n    pass",
        "def f():\n    from transformers import AttentionInterface\n    AttentionInterface.register(name, g)",
        "import deepspeed\ndef f():\n    deepspeed.ops.flags['x'] = False",
        "from deepspeed.runtime import Optimizer\ndef f():\n    Optimizer.step = g",
    ],
)
def test_patches_are_seen_in_every_form(source: str) -> None:
    assert sites(ast.parse(source)) == {"f"}
