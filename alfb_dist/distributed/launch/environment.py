"""What ranks on other hosts get of this process's environment."""

from __future__ import annotations

import atexit
import os
import tempfile
from pathlib import Path

_PREFIXES: tuple[str, ...] = (
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHON",
    "DS_",
    "OMP_",
    "NCCL_",
    "GLOO_",
    "TP_",
    "TORCH_",
    "CUDA_",
    "ALFB_",
)
_PREFIXES += ("TOKENIZERS_", "WANDB_MODE", "WANDB_DIR", "HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_NOT = ("DS_ENV_FILE",)


def variables_for_ranks(master_addr: str) -> dict[str, str]:
    """The variables that decide how ranks run. No secrets: launchers put what they export into command lines.

    master_addr: of the first host, as the others reach it.
    """
    ours = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_PREFIXES) and name not in _NOT and "\n" not in value
    }
    return {**ours, "MASTER_ADDR": master_addr}


def environment_with_exports(master_addr: str) -> dict[str, str]:
    """The environment of a launcher that starts ranks on other hosts.

    The deepspeed launcher exports to them what a file lists. A file of the user's stays the one that counts:
    DS_ENV_FILE, or .deepspeed_env at home or here. mpirun's ssh gets the options that pdsh's gets.
    """
    found = dict(os.environ)
    if "PDSH_SSH_ARGS_APPEND" in found:
        found.setdefault("PRTE_MCA_plm_ssh_args", found["PDSH_SSH_ARGS_APPEND"])
    theirs = [Path.home() / ".deepspeed_env", Path(".deepspeed_env")]
    if "DS_ENV_FILE" in found or any(path.is_file() for path in theirs):
        return found
    with tempfile.NamedTemporaryFile("w", prefix="alfb-env-", delete=False) as file:
        file.writelines(f"{name}={value}\n" for name, value in variables_for_ranks(master_addr).items())
    atexit.register(Path(file.name).unlink, missing_ok=True)
    return {**found, "DS_ENV_FILE": file.name}
