"""The examples are scripts, not a package: they find each other as under `python examples/…`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
