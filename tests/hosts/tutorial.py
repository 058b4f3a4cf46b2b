"""The tutorial's commands, out of the document itself."""

from __future__ import annotations

import re
from pathlib import Path

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"


def commands(document: str) -> str:
    """The fenced shell commands as one script that stops at the first that fails."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    return "set -eux\n" + "".join(blocks)
