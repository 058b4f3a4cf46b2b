"""Weights & Biases, kept at arm's length: no call on the training loop ever waits for it or fails because of it.

A thread of its own starts the run, logs and finishes; the loop only puts values on a bounded queue. What happens to
the tracker, an outage at the start, midway or at the end, costs at most the wait in close().
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


def resolve_mode(wanted: str) -> str:
    """The mode to run in: "auto" is WANDB_MODE if set, else online with an account and offline without one."""
    if wanted == "auto":
        stated = os.environ.get("WANDB_MODE", "")
        known = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
        return known.get(stated, "online" if has_account() else "offline")
    return wanted


def has_account() -> bool:
    """Whether a key for the wandb server is at hand, in the environment or in netrc; nothing is asked or sent."""
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
    """One wandb run under the run folder, fed from a queue."""

    def __init__(
        self,
        run_folder: Path,
        *,
        mode: str,
        project: str,
        run_name: str,
        config: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """The thread that starts the wandb run is under way. mode: "online" or "offline". say: shows a message."""
        self._folder = run_folder
        self._mode = mode
        # Each start, also one that resumes, is a wandb run of its own; the starts of one run share a group.
        self._identity = {"project": project, "name": run_name, "group": run_name, "config": redact(config)}
        self._show = say
        self._left_behind = False
        self._records = 0
        self._queue: queue.Queue[Callable[[], Values] | None] = queue.Queue(maxsize=_QUEUED)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def training(self, record: dict[str, Any], load_LE: np.ndarray[Any, Any], layer_names: Sequence[str]) -> None:
        """The record waits to be logged, with a picture of the loads every now and then; dropped if wandb lags far."""
        with_picture = self._records % _MEDIA_EVERY == 0
        self._records += 1
        kept, loads = dict(record), load_LE if with_picture else None
        self._put(lambda: training_values(kept, loads, layer_names))

    def evaluation(self, record: dict[str, Any], load_LE: np.ndarray[Any, Any], layer_names: Sequence[str]) -> None:
        """The record waits to be logged."""
        kept = dict(record)
        self._put(lambda: evaluation_values(kept, load_LE, layer_names))

    def close(self) -> None:
        """The wandb run is finished, or given up after 15 s; what was logged stays in the run folder either way."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        try:
            self._queue.put(None, timeout=_CLOSE_SECONDS)
        except queue.Full:
            pass  # as good as not finished
        else:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._say(f"wandb: left behind after {_CLOSE_SECONDS:g} s; `wandb sync` uploads what is on disk")
            self._left_behind = True

    def _say(self, text: str) -> None:
        if not self._left_behind:
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
        """The started run: online if asked and possible, else offline, else None."""
        if self._mode == "online" and not has_account():
            self._say("wandb: online was asked for but there is no account here (`wandb login`), recording offline")
            self._mode = "offline"
        try:
            return self._init("online" if self._mode == "online" else "offline")
        except Exception as error:
            if self._mode == "offline":
                self._say(f"wandb: off, since it does not start: {_brief(error)}")
                return None
            self._say(
                f"wandb: the server does not answer ({_brief(error)}); recording offline, `wandb sync` uploads later"
            )
        self._mode = "offline"
        return self._start()

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else wandb's own telemetry delays exit in an outage
        import wandb

        known = getattr(wandb.Settings, "model_fields", _SETTINGS)
        settings = wandb.Settings(**{key: value for key, value in _SETTINGS.items() if key in known})
        run_id = secrets.token_hex(4)
        run = wandb.init(
            **self._identity, id=run_id, dir=str(self._folder), mode=mode, reinit="create_new", settings=settings
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _log(self, run: Any, values: Callable[[], Values]) -> Any:
        """The run, with the values logged; None, and one message, if wandb refuses."""
        try:
            run.log(values())
        except Exception as error:
            self._say(f"wandb: off from here on ({_brief(error)}); every record is in metrics.jsonl")
            self._finish(run, quiet=True)
            return None
        return run

    def _finish(self, run: Any, *, quiet: bool = False) -> None:
        try:
            run.finish()
        except Exception as error:
            if not quiet:
                self._say(f"wandb: not finished cleanly ({_brief(error)}); every record is in metrics.jsonl")


def _brief(error: Exception) -> str:
    """The error's kind and first line, without secrets."""
    text = str(redact(str(error))).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160] if text else ''}"
