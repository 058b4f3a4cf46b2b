"""Secrets of the environment, kept out of everything that is written."""

from __future__ import annotations

import os
import re
from typing import Any

_SECRET_NAME = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
_SHORTEST = 8  # shorter values are words such as "true", which would be cut out of innocent text
_MARK = "[redacted]"


def redact(value: Any) -> Any:
    """The value without any secret that an environment variable holds, in strings at any depth of lists and dicts."""
    return _replace(value, _secrets())


def _secrets() -> list[str]:
    """Values of the variables whose names speak of a key, token, secret or password; the longest first."""
    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST}
    return sorted(found, key=len, reverse=True)


def _replace(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, _MARK)
        return value
    if isinstance(value, dict):
        return {_replace(key, secrets): _replace(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace(item, secrets) for item in value]
    return value
