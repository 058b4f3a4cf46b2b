"""`python -m alfb_dist.bench.document FILE [WORD]` measures the tables of a document again.

A table stands between `<!-- alfb bench ARGUMENTS -->` and `<!-- end -->`. WORD: only tables whose arguments contain it.
"""

from __future__ import annotations

import datetime
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from alfb_dist.bench.spawn import run_command

_TABLE = re.compile(r"<!-- alfb bench (.*?) -->\n.*?<!-- end -->", re.S)


def measure_table(arguments: str) -> str:
    """Return the table of `alfb bench ARGUMENTS` with the date. Raises RuntimeError if the command fails."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "alfb_dist.cli", "bench", *shlex.split(arguments), "--out", directory]
        run_command(command, f"alfb bench {arguments}")
        return f"{Path(directory, 'bench.md').read_text().strip()}. {datetime.date.today()}."


def update_tables(text: str, word: str, measure: Callable[[str], str]) -> str:
    """Return the text with a new table for each whose arguments contain the word. Raises ValueError if none does."""
    if not any(word in arguments for arguments in _TABLE.findall(text)):
        raise ValueError(f"no table's arguments contain {word!r}: a table follows <!-- alfb bench ARGUMENTS -->")

    def new_table(match: re.Match[str]) -> str:
        if word not in match[1]:
            return match[0]
        return f"<!-- alfb bench {match[1]} -->\n`alfb bench {match[1]}`\n\n{measure(match[1])}\n<!-- end -->"

    return _TABLE.sub(new_table, text)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(update_tables(file.read_text(), "".join(sys.argv[2:3]), measure_table))
