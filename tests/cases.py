"""Pairs of the kinds that training runs leave behind, made by the scripts in `../shared/cases`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parents[2] / "shared" / "cases"


def make_case(name: str, out: Path) -> Path:
    """Run a maker; its test is skipped where the makers are not at hand."""
    script = CASES / f"{name}.py"
    if not script.is_file():
        pytest.skip(f"{script} IS NOT THERE, so its pair was not made")
    out.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(
        [sys.executable, script, out], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return out
