"""Weights & Biases, at arm's length: the training loop never waits for it or fails because of it.

A thread of its own starts the run, logs and finishes; the loop only puts values into a bounded queue. An outage of the
tracker costs at most the wait in close().
"""

from __future__ import annotations

import netrc
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from alfb_dist.report.redaction import redact
from alfb_dist.report.wandb_values import Values, evaluation_values, training_values

_INIT_SECONDS = 8.0
_FINISH_SECONDS = 8.0
_CLOSE_SECONDS = 15.0
_QUEUED = 1000
_MEDIA_EVERY = 50  # logged records between two load pictures

# No code, no git state, no command line, no machine facts, no captured output; and short waits.
_SETTINGS: dict[str, Any] = {
    "init_timeout": _INIT_SECONDS,
    "login_timeout": 5.0,
    "finish_timeout": _FINISH_SECONDS,
    "silent": True,
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


def resolve_mode(mode: str) -> str:
    """Return the mode to run in: "auto" is WANDB_MODE if set, else online with an account and offline without one."""
    if mode == "auto":
        modes = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
        return modes.get(os.environ.get("WANDB_MODE", ""), "online" if has_account() else "offline")
    return mode


def has_account() -> bool:
    """Return whether there is a key for the wandb server in the environment or in netrc; contacts nobody."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    places = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for place in places:
        try:
            if host in netrc.netrc(os.path.expanduser(place)).hosts:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


class WandbSink:
    """One wandb run in the run directory, fed from a queue."""

    def __init__(
        self,
        run_directory: Path,
        *,
        mode: str,
        project: str,
        run_name: str,
        config: dict[str, Any],
        show: Callable[[str], None],
    ) -> None:
        """Start the thread that starts the wandb run. mode: "online" or "offline". show: called with a message."""
        self._directory = run_directory
        self._mode = mode
        # Each start, also a resumed one, is a wandb run of its own; the starts of one run share a group.
        self._identity = {"project": project, "name": run_name, "group": run_name, "config": redact(config)}
        self._show = show
        self._abandoned = False
        self._records = 0
        self._queue: queue.Queue[Callable[[], Values] | None] = queue.Queue(maxsize=_QUEUED)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def training(self, record: dict[str, Any], load_LE: np.ndarray[Any, Any], layer_names: Sequence[str]) -> None:
        """Queue the record, sometimes with a picture of the loads; it is dropped if the queue is full."""
        with_picture = self._records % _MEDIA_EVERY == 0
        self._records += 1
        copy, loads = dict(record), load_LE if with_picture else None
        self._put(lambda: training_values(copy, loads, layer_names))

    def evaluation(self, record: dict[str, Any], load_LE: np.ndarray[Any, Any], layer_names: Sequence[str]) -> None:
        """Queue the record; it is dropped if the queue is full."""
        copy = dict(record)
        self._put(lambda: evaluation_values(copy, load_LE, layer_names))

    def close(self) -> None:
        """Finish the wandb run, or give up after 15 s; what was logged stays in the run directory either way."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        try:
            self._queue.put(None, timeout=_CLOSE_SECONDS)
        except queue.Full:
            pass  # the thread is still busy: see below
        else:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._message(f"wandb: not finished after {_CLOSE_SECONDS:g} s; `wandb sync` uploads what is on disk")
            self._abandoned = True

    def _message(self, text: str) -> None:
        if not self._abandoned:
            self._show(text)

    def _put(self, values: Callable[[], Values]) -> None:
        with suppress(queue.Full):  # metrics.jsonl has every record, and no training step waits for a dashboard
            self._queue.put_nowait(values)

    def _work(self) -> None:
        run = self._start()
        while (values := self._queue.get()) is not None:
            if run is not None:
                run = self._log(run, values)
        if run is not None:
            self._finish(run)

    def _start(self) -> Any:
        """Return the started run: online if requested and possible, else offline, else None."""
        if self._mode == "online" and not has_account():
            self._message("wandb: no account for mode online (run `wandb login`); recording offline")
            self._mode = "offline"
        try:
            return self._init("online" if self._mode == "online" else "offline")
        except Exception as error:
            if self._mode == "offline":
                self._message(f"wandb: off, since it does not start: {_brief(error)}")
                return None
            self._message(
                f"wandb: the server does not answer ({_brief(error)}); recording offline, `wandb sync` uploads later"
            )
        self._mode = "offline"
        return self._start()

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else its telemetry delays the exit in an outage
        import wandb

        known = getattr(wandb.Settings, "model_fields", _SETTINGS)
        settings = wandb.Settings(**{key: value for key, value in _SETTINGS.items() if key in known})
        run_id = secrets.token_hex(4)
        run = wandb.init(
            **self._identity, id=run_id, dir=str(self._directory), mode=mode, reinit="create_new", settings=settings
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _log(self, run: Any, values: Callable[[], Values]) -> Any:
        """Log the values and return the run; None, with a message, if wandb raises."""
        try:
            run.log(values())
        except Exception as error:
            self._message(f"wandb: off from here on ({_brief(error)}); every record is in metrics.jsonl")
            self._finish(run, quiet=True)
            return None
        return run

    def _finish(self, run: Any, *, quiet: bool = False) -> None:
        try:
            run.finish()
        except Exception as error:
            if not quiet:
                self._message(f"wandb: not finished cleanly ({_brief(error)}); every record is in metrics.jsonl")


def _brief(error: Exception) -> str:
    """Return the error's type and first line, without secrets."""
    text = str(redact(str(error))).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160] if text else ''}"
