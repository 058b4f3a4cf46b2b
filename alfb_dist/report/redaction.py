"""Removes secrets from everything that is written."""

from __future__ import annotations

import os
import re
from typing import Any

_SECRET_NAME = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
_MIN_LENGTH = 8  # shorter values are words such as "true", which occur in harmless text
_MARK = "[redacted]"


def redact(value: Any) -> Any:
    """Replace the secrets of the environment in strings, also inside lists and dicts."""
    return _replace(value, _secrets())


def _secrets() -> list[str]:
    """Return the values of the variables named like a key, token, secret or password, the longest first."""
    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _MIN_LENGTH}
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
