"""The versions of Python and of the packages that alfb_dist requires."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.result import Result, not_applicable, ok, problem, warning

PACKAGE = "alfb_dist"


def judge_python(version: str, wanted: str) -> Result:
    """Judge the version of Python."""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return ok("python", f"{version} ({wanted})")
    return problem("python", f"{version} is not {wanted}", f"create the virtual environment with Python {wanted}")


def judge_package(requirement: Requirement, version: str | None) -> Result:
    """Judge the version of a package. One that only an extra requires may be missing."""
    check, install = f"package {requirement.name}", f"pip install '{requirement.name}{requirement.specifier}'"
    optional = requirement.marker is not None
    if version is None:
        return not_applicable(check, "not installed") if optional else problem(check, "not installed", install)
    if requirement.specifier.contains(version, prereleases=True):
        return ok(check, f"{version} ({requirement.specifier})")
    found = f"{version} is not {requirement.specifier}"
    return warning(check, found, install) if optional else problem(check, found, install)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_packages(case: Case) -> Iterator[Result]:
    """Check Python and the packages; those that are fine share one result."""
    try:
        about = metadata.metadata(PACKAGE)
    except metadata.PackageNotFoundError:
        yield problem(
            "packages", f"{PACKAGE} is not installed", f"run `pip install --editable .` in the sources of {PACKAGE}"
        )
        return
    yield judge_python(platform.python_version(), about["Requires-Python"])
    requirements = [Requirement(text) for text in metadata.requires(PACKAGE) or ()]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    extras = [r for r in requirements if r not in needed and r.name != PACKAGE]
    found = [(r, judge_package(r, _version(r.name))) for r in needed + extras]
    yield from (result for _, result in found if result.verdict in ("warning", "problem"))
    good = [f"{r.name} {_version(r.name)}" for r, result in found if r in needed and result.verdict == "ok"]
    yield ok("packages", ", ".join(good))
