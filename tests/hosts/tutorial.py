"""The tutorial's commands, read from the document."""

from __future__ import annotations

import re
from pathlib import Path

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"


def commands(document: str) -> str:
    """Return the fenced shell commands as one script that stops at the first failure."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    return "set -eux\n" + "".join(blocks)
