"""The environment variables that ranks on other hosts take over from this process."""

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
_EXCLUDED = ("DS_ENV_FILE",)


def variables_for_ranks(master_addr: str) -> dict[str, str]:
    """Return the variables that decide how ranks run. No secrets: launchers put what they export into command lines.

    master_addr: of the first host, as the others reach it.
    """
    exported = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_PREFIXES) and name not in _EXCLUDED and "\n" not in value
    }
    return {**exported, "MASTER_ADDR": master_addr}


def environment_with_exports(master_addr: str) -> dict[str, str]:
    """Return the environment of a launcher that starts ranks on other hosts.

    The deepspeed launcher exports to them the variables that a file lists: a temporary file made here, unless the user
    has one (DS_ENV_FILE, or .deepspeed_env in the home or current directory). mpirun's ssh gets the options of pdsh's.
    """
    environment = dict(os.environ)
    if "PDSH_SSH_ARGS_APPEND" in environment:
        environment.setdefault("PRTE_MCA_plm_ssh_args", environment["PDSH_SSH_ARGS_APPEND"])
    users = [Path.home() / ".deepspeed_env", Path(".deepspeed_env")]
    if "DS_ENV_FILE" in environment or any(path.is_file() for path in users):
        return environment
    with tempfile.NamedTemporaryFile("w", prefix="alfb-env-", delete=False) as file:
        file.writelines(f"{name}={value}\n" for name, value in variables_for_ranks(master_addr).items())
    atexit.register(Path(file.name).unlink, missing_ok=True)
    return {**environment, "DS_ENV_FILE": file.name}
