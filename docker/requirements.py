"""Print the dependencies that pyproject.toml names, with those of the extra mpi; of one package if it is given."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["mpi"]:
    name = re.match(r"[\w-]+", requirement)[0]
    if name in sys.argv[1:] or len(sys.argv) == 1:
        print(requirement)
