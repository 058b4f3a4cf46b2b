"""The C sources in csrc/, compiled once for this machine and kept in the user's cache directory."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"

# Sums may be reordered and nothing traps, but NaN and inf are kept. Not -ffast-math: linking with it makes the whole
# process flush denormal numbers to zero.
_MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math")
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", *_MATH)


def cache_dir() -> Path:
    """Return where compiled code is kept: $XDG_CACHE_HOME/alfb_dist, by default ~/.cache/alfb_dist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "alfb_dist")


def find_compiler() -> str | None:
    """Return the path of the C compiler ($CC, else cc, gcc or clang), or None if there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)


def load(source: Path) -> ctypes.CDLL | None:
    """Return the compiled source, or None if there is no compiler, it fails, or ALFB_NATIVE=0 is set.

    Compiling takes a quarter of a second, once per machine and version of the source. The reason for None is logged.
    """
    compiler = find_compiler()
    if os.environ.get("ALFB_NATIVE") == "0" or compiler is None:
        log.info("%s is not compiled: %s", source.name, "no C compiler" if compiler is None else "ALFB_NATIVE=0")
        return None
    texts = [file.read_text() for file in (source, *sorted(SOURCES.glob("*.h")))]
    command = [compiler, *_FLAGS]
    key = hashlib.sha256("\0".join([*texts, *command, _processor()]).encode()).hexdigest()[:16]
    library = cache_dir() / f"{source.stem}-{key}.so"
    try:
        if not library.exists():
            _compile(command, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("%s is not compiled: %s", source.name, error)
        return None


def _processor() -> str:
    """Return what -march=native depends on, since machines may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "model name", "Features", "CPU part"))})
    )


def _compile(command: list[str], source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        compiled = Path(directory, library.name)
        command = [*command, str(source), "-o", str(compiled), "-lm"]
        try:
            subprocess.run([*command, "-fopenmp"], check=True, capture_output=True, timeout=120)
        except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        compiled.replace(library)  # other processes may be compiling the same: the file is always complete


class Library:
    """The functions of one C source, which is compiled when they are first needed.

    functions: for each name the number of int64 arguments and of pointers, which come in this order.
    returning: the names of those that return an int64; the others return nothing.
    """

    def __init__(self, source: str, functions: dict[str, tuple[int, int]], returning: Collection[str] = ()) -> None:
        self._source, self._functions, self._returning = source, functions, returning

    @functools.cached_property
    def _loaded(self) -> ctypes.CDLL | None:
        library = load(SOURCES / self._source)
        for name, (num_integers, num_pointers) in self._functions.items() if library else ():
            function = getattr(library, name)
            function.argtypes = [ctypes.c_int64] * num_integers + [ctypes.c_void_p] * num_pointers
            function.restype = ctypes.c_int64 if name in self._returning else None
        return library

    def available(self) -> bool:
        """Return whether the source is compiled and loaded, compiling it the first time."""
        return self._loaded is not None

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function; a tensor is passed as the address of its data, None as a null pointer."""
        return getattr(self._loaded, name)(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])
