"""C sources of this package, compiled once for this machine and kept in the user's cache folder."""

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
from pathlib import Path

log = logging.getLogger(__name__)

# Reordered sums and no traps, but NaN and inf as they are. Not -ffast-math: linking with it makes the whole process
# flush denormal numbers to zero.
_MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math")
_EXACT = ("-ffp-contract=off",)
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared")


def cache_folder() -> Path:
    """Where compiled code is kept: $XDG_CACHE_HOME/alfb_dist, by default ~/.cache/alfb_dist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "alfb_dist")


def _machine() -> str:
    """What -march=native depends on: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "model name", "Features", "CPU part"))})
    )


def _compile(command: list[str], source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder, library.name)
        command = [*command, str(source), "-o", str(made), "-lm"]
        try:
            subprocess.run([*command, "-fopenmp"], check=True, capture_output=True, timeout=120)
        except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        made.replace(library)  # whole or not at all, whoever else compiles it now


def find_compiler() -> str | None:
    """The C compiler: $CC, else cc, gcc or clang; None if there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)


@functools.cache
def load(source: Path, *, exact: bool = False) -> ctypes.CDLL | None:
    """The compiled source, or None where there is no compiler, it fails, or ALFB_NATIVE=0 is set.

    exact: sums and products are taken as they stand there.

    Compiling takes a quarter of a second, once per machine and version of the source. Why None is logged, once.
    """
    compiler = find_compiler()
    if os.environ.get("ALFB_NATIVE") == "0" or compiler is None:
        log.info("%s is not compiled: %s", source.name, "no C compiler" if compiler is None else "ALFB_NATIVE=0")
        return None
    texts = [file.read_text() for file in (source, *sorted(Path(__file__).parent.rglob("*.h")))]
    command = [compiler, *_FLAGS, *(_EXACT if exact else _MATH)]
    key = hashlib.sha256("\0".join([*texts, *command, _machine()]).encode()).hexdigest()[:16]
    library = cache_folder() / f"{source.stem}-{key}.so"
    try:
        if not library.exists():
            _compile(command, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("%s is not compiled: %s", source.name, error)
        return None
