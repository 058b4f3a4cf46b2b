"""`python -m alfb_dist.bench.document FILE [WORD]`: a document's tables are measured anew.

A table stands between `<!-- alfb bench ARGUMENTS -->` and `<!-- end -->`. WORD: only those whose arguments hold it.
"""

from __future__ import annotations

import datetime
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_TABLE = re.compile(r"<!-- alfb bench (.*?) -->\n.*?<!-- end -->", re.S)


def measured(arguments: str) -> str:
    """What `alfb bench ARGUMENTS` has found, with the date; RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "alfb_dist.cli", "bench", *shlex.split(arguments), "--out", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"alfb bench {arguments} failed:\n{done.stderr[-4000:]}")
        return f"{Path(folder, 'bench.md').read_text().strip()}. {datetime.date.today()}."


def renewed(text: str, word: str, measure: Callable[[str], str]) -> str:
    """The text with each table replaced whose arguments hold the word; ValueError if there is none."""
    wanted = [arguments for arguments in _TABLE.findall(text) if word in arguments]
    if not wanted:
        raise ValueError(f"no table's arguments hold {word!r}: tables follow <!-- alfb bench ARGUMENTS -->")

    def replaced(found: re.Match[str]) -> str:
        if word not in found[1]:
            return found[0]
        return f"<!-- alfb bench {found[1]} -->\n`alfb bench {found[1]}`\n\n{measure(found[1])}\n<!-- end -->"

    return _TABLE.sub(replaced, text)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(renewed(file.read_text(), "".join(sys.argv[2:3]), measured))
