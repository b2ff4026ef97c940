"""Prints what extras of the package require, so that installing them does not build the package again.

python scripts/extras.py dev tasks
"""

import sys
import tomllib
from pathlib import Path

extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
print("\n".join(requirement for name in sys.argv[1:] for requirement in extras[name]))
