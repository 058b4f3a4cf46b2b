"""Print the dependencies in pyproject.toml, the extra mpi included, or only those with the given names."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["mpi"]:
    name = re.match(r"[\w-]+", requirement)[0]
    if name in sys.argv[1:] or len(sys.argv) == 1:
        print(requirement)
