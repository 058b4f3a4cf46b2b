"""The launchers: deepspeed, torchrun, and mpirun with mpi4py."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from alfb_dist.cli.doctor.case import Case
from alfb_dist.cli.doctor.result import Result, not_applicable, ok, problem, warning

MPI_SECONDS = 60
_MPI_PROGRAM = "from mpi4py import MPI; print('of', MPI.COMM_WORLD.size, flush=True)"
# Allow root, and more ranks than cores.
_MPI_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


def judge_launcher(name: str, path: str | None, directory: Path) -> Result:
    """Judge a launcher. path: where the shell finds it. directory: that of the running Python."""
    fix = f'activate the virtual environment, or export PATH="{directory}:$PATH"'
    if path is None:
        return problem(f"launcher {name}", "not on PATH", fix)
    if Path(path).parent != directory:
        return warning(f"launcher {name}", f"{path} belongs to another Python than {directory}", fix)
    return ok(f"launcher {name}", path)


def judge_mpi(path: str | None, has_mpi4py: bool, output: str | None) -> Result:
    """Judge mpirun. output: what two processes printed about the size of their world; None if they did not end."""
    check, install = "launcher mpirun", "pip install 'alfb_dist[mpi]'"
    if path is None and not has_mpi4py:
        return not_applicable(check, f"neither mpirun nor mpi4py is installed; {install} installs both")
    if path is None:
        return warning(check, "mpi4py is installed, but mpirun is not on PATH", install)
    if not has_mpi4py:
        return warning(check, f"{path}, but mpi4py is not installed", install)
    if output is None:
        return warning(check, f"{path} did not end within {MPI_SECONDS} s", "use another launcher, or fix MPI")
    sizes = [line for line in output.splitlines() if line.startswith("of ")]
    if sizes == ["of 2", "of 2"]:
        return ok(check, f"{path}; two processes met through mpi4py")
    if sizes == ["of 1", "of 1"]:
        return warning(check, f"{path} belongs to another MPI than mpi4py: each process is alone", install)
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "nothing was printed")
    return warning(check, f"{path} fails: {last.strip()[:120]}", "use another launcher, or fix MPI")


def _try_mpi(path: str) -> str | None:
    command = [path, "-n", "2", sys.executable, "-c", _MPI_PROGRAM]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **_MPI_ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=MPI_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    except OSError as error:
        return str(error)
    return done.stdout


def check_launchers(case: Case) -> Iterator[Result]:
    """Check the launchers that can start a run here."""
    directory = Path(sys.executable).parent
    yield judge_launcher("deepspeed", shutil.which("deepspeed"), directory)
    yield judge_launcher("torchrun", shutil.which("torchrun"), directory)
    path, has_mpi4py = shutil.which("mpirun"), importlib.util.find_spec("mpi4py") is not None
    yield judge_mpi(path, has_mpi4py, _try_mpi(path) if path and has_mpi4py else None)
