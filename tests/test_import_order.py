"""Data flows one way: a package imports only from those left of it, never what its neighbour is for, and all
collectives live in one file."""

from __future__ import annotations

import ast
import graphlib
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

import alfb_dist

PACKAGE = Path(alfb_dist.__file__).parent
ROOT = PACKAGE.name

ORDER = """
    profiling config data report balance cpu distributed moe engine checkpoint bench pretrained training cli
""".split()
"""The packages, from left to right. A new one takes its place here."""

NEVER = {
    "balance": ("torch.nn.Module", "torch.nn.Parameter", "torch.distributed", "torch.optim", "numpy", "alfb_dist"),
    "cpu": ("alfb_dist", "transformers"),
    "distributed": ("torch.nn", "transformers", "alfb_dist.balance"),
    "moe": ("torch.optim", "torch.save", "pathlib", "alfb_dist.config"),
    "engine": ("transformers.models",),
    "config": ("torch", "torch.distributed", "deepspeed", "transformers", "alfb_dist"),
    "data": ("torch.distributed", "alfb_dist.distributed"),
    "checkpoint": ("transformers",),
    "pretrained": ("torch.optim", "deepspeed"),
    "report": ("torch.distributed", "alfb_dist.balance", "alfb_dist.distributed"),
    "training": ("deepspeed", "alfb_dist.cpu"),
}
"""What a package never uses, besides what stands right of it: algorithms know no processes, processes no models, the
layer no files, and so on. Its own modules are not meant."""

ONLY = {
    "deepspeed": ("engine", "moe.sharded_experts", "moe.frozen_experts"),
    "transformers.": (
        "moe.families",
        "moe.recompute",
        "pretrained",
        "engine.attention",
        "training.trainer_callback",
        "bench.block",
    ),
}
"""Who alone may import DeepSpeed and inner modules of transformers: where an upgrade of either has to be checked."""

HOLDS_COLLECTIVES = {"alfb_dist.distributed.collectives"}

# What any file may use of torch.distributed: questions about a process and its groups, none of which communicates.
HARMLESS = {
    "DistError",
    "ProcessGroup",
    "get_backend",
    "get_global_rank",
    "get_process_group_ranks",
    "get_rank",
    "get_world_size",
    "group",
    "is_available",
    "is_initialized",
    "is_nccl_available",
}
# ProcessGroup's own methods that communicate.
METHODS = {"allgather", "allreduce", "alltoall", "alltoall_base", "reduce_scatter", "recv_anysource"}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, parsed."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = (ROOT, *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imports_of(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The package's modules that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == ROOT)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            if node.module and node.module.split(".")[0] == ROOT:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in known else node.module


def place(module: str) -> str:
    """Which entry of ORDER a dotted name belongs to; the package itself belongs to none."""
    return module.split(".")[1] if "." in module else ROOT


def test_every_module_has_its_place_in_the_order() -> None:
    optional = set() if (PACKAGE / "cpu").is_dir() else {"cpu"}
    assert {place(m) for m in MODULES} - {ROOT} == set(ORDER) - optional
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("module", [m for m in MODULES if m != ROOT])
def test_module_imports_only_from_its_left(module: str) -> None:
    here = ORDER.index(place(module))
    for imported in imports_of(MODULES[module], set(MODULES)):
        if imported != ROOT and place(imported) != place(module):
            there = ORDER.index(place(imported))
            assert there < here, f"{module} imports {imported}, which stands right of it"


WITH_ANOTHER = {"pydantic_core": "pydantic", "triton": "torch"}  # comes with it, bounds and all


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["mpi"]]
    declared = {Requirement(text).name.replace("-", "_") for text in requirements}
    nodes = [node for tree in MODULES.values() for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {ROOT}
    assert {WITH_ANOTHER.get(name, name) for name in others} <= declared


def test_no_module_imports_itself_by_a_detour() -> None:
    """Also within a folder. The package itself imports on demand only, so nothing imports by way of it."""
    graph = {m: set(imports_of(tree, set(MODULES))) - {ROOT, m} for m, tree in MODULES.items() if m != ROOT}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_package_and_command_line_start_without_torch() -> None:
    heavy = ("torch", "deepspeed", "transformers")
    code = f"import sys, {ROOT}, {ROOT}.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", alfb_dist.__all__)
def test_public_name_stays_what_it_is_after_any_import(name: str) -> None:
    """`alfb_dist.parallelize` is the function, also once every file has been imported."""
    home = importlib.import_module(f"{ROOT}.{alfb_dist._HOMES[name]}")
    for _ in range(2):
        public = getattr(alfb_dist, name)
        assert not isinstance(public, ModuleType) and public is getattr(home, name)
    assert name in dir(alfb_dist)


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'alfb_dist' has no attribute 'nothing'"):
        _ = alfb_dist.nothing


def dotted(node: ast.expr) -> str:
    """a.b.c of an attribute of a name, '' of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (inner := dotted(node.value)):
        return f"{inner}.{node.attr}"
    return ""


def uses(tree: ast.Module) -> set[str]:
    """The dotted names of what a module imports and of the attributes it reads from that, such as torch.nn.Module."""
    names: dict[str, str] = {}
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                root = a.name.split(".")[0]
                names[a.asname or root] = a.name if a.asname else root
                used.add(a.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            used |= {f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = dotted(node).partition(".")
            used.add(f"{names.get(root, root)}.{rest}")
    return used


def communicates(tree: ast.Module) -> list[str]:
    """What a module uses of torch.distributed, deepspeed.comm or a process group that may be a collective."""
    used = uses(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            used.add(f"torch.distributed.{node.func.attr}")
    inside = [
        u.removeprefix(f"{home}.")
        for u in used
        for home in ("torch.distributed", "deepspeed.comm")
        if u.startswith(f"{home}.")
    ]
    return sorted({u for u in inside if u.split(".")[0] not in HARMLESS})


def breaches(module: str, tree: ast.Module) -> list[str]:
    """What a module uses that its package must never use."""
    own = f"{ROOT}.{place(module)}"
    foreign = {name for name in uses(tree) if name != own and not name.startswith(f"{own}.")}
    never = NEVER.get(place(module), ())
    return sorted(name for name in foreign if any(f"{name}.".startswith(f"{word}.") for word in never))


@pytest.mark.parametrize("module", [m for m in MODULES if place(m) in NEVER])
def test_package_never_uses_what_its_neighbours_are_for(module: str) -> None:
    assert breaches(module, MODULES[module]) == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("balance.router", "from torch import nn\nclass A(nn.Module): pass", ["torch.nn.Module"]),
        ("balance.router", "from torch import nn\nnn.functional.linear(x, w)", []),
        (
            "balance.metrics",
            "from alfb_dist.distributed.collectives import all_sum",
            ["alfb_dist.distributed.collectives.all_sum"],
        ),
        ("balance.metrics", "from alfb_dist.balance.router import RouterSpec", []),
        ("cpu.build", "import alfb_dist", ["alfb_dist"]),
        ("cpu.experts", "from alfb_dist.cpu import build\nbuild.load(x)", []),
        ("distributed.topology", "import torch\ndef f(m: torch.nn.Linear): ...", ["torch.nn", "torch.nn.Linear"]),
        ("moe.gate", "from alfb_dist.config import Config", ["alfb_dist.config.Config"]),
        ("config.rules", "def f():\n    import torch", ["torch"]),
        (
            "report.html",
            "from alfb_dist.balance.metrics import max_violation",
            ["alfb_dist.balance.metrics.max_violation"],
        ),
    ],
)
def test_check_for_breaches_sees_them(module: str, source: str, found: list[str]) -> None:
    assert breaches(f"{ROOT}.{module}", ast.parse(source)) == found


@pytest.mark.parametrize("module", [m for m in MODULES if m != ROOT])
def test_only_the_seams_import_deepspeed_and_the_inside_of_transformers(module: str) -> None:
    nodes = [node for node in ast.walk(MODULES[module]) if isinstance(node, ast.ImportFrom)]
    imported = {f"{node.module}.{a.name}." for node in nodes for a in node.names} | {
        f"{a.name}." for node in ast.walk(MODULES[module]) if isinstance(node, ast.Import) for a in node.names
    }
    here = module.removeprefix(f"{ROOT}.")
    for word, allowed in ONLY.items():
        inside = {name for name in imported if name.startswith(word)}
        if word == "transformers.":  # its classes are public, its modules are not
            inside = {name for name in inside if name.split(".")[1][:1].islower()}
        if inside and not any(f"{here}.".startswith(f"{home}.") for home in allowed):
            pytest.fail(f"{module} imports {sorted(inside)}, which only {', '.join(allowed)} may")


@pytest.mark.parametrize("module", MODULES)
def test_only_the_files_for_it_communicate(module: str) -> None:
    used = communicates(MODULES[module])
    assert (not used) or module in HOLDS_COLLECTIVES, f"{module} uses {used}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.distributed as dist\ndist.all_reduce(x)", ["all_reduce"]),
        ("import torch\ntorch.distributed.barrier()", ["barrier"]),
        ("def f():\n    from torch.distributed import broadcast as b\n    b(x)", ["broadcast"]),
        ("from torch import distributed\ndistributed.all_gather(x, y)", ["all_gather"]),
        ("import deepspeed\ndeepspeed.comm.all_reduce(x)", ["all_reduce"]),
        ("from deepspeed import comm as dist\ndist.barrier()", ["barrier"]),
        ("def f(group):\n    group.allreduce([x])", ["allreduce"]),
        ("import torch.distributed as dist\nf = dist.new_group", ["new_group"]),
        ("import torch.distributed as dist\ndist.get_rank()\ndist.group.WORLD", []),
        ("from alfb_dist.distributed.collectives import all_sum, barrier\nbarrier(all_sum(x, g))", []),
    ],
)
def test_check_for_collectives_sees_them_in_every_guise(source: str, found: list[str]) -> None:
    assert communicates(ast.parse(source)) == found
