"""What reads checkpoints larger than memory keeps to the memory that docs/memory.md says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.diagnostics import frugal

ROOT = Path(__file__).parents[3]
ROW = re.compile(r"^\| `([\w-]+)` \|.*\| (\d+) \|$", re.MULTILINE)
STATED = {name: int(copies) for name, copies in ROW.findall((ROOT / "docs/memory.md").read_text())}
STREAMED = (
    "intruders", "masks", "density", "movement", "interpolate", "mitigate", "mitigate-update", "graft",
)  # fmt: skip


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Of each command why it failed, empty where it did not."""
    if sys.platform != "linux":
        pytest.skip("RLIMIT_DATA counts anonymous memory on Linux alone")
    most = max(STATED[name] for name in STREAMED)
    limits = {name: STATED[name] for name in STREAMED} | {"load": most, "keep-mapped": most}
    # Matrices that matter are above the size from which malloc gives every block back at once.
    plain = {"MALLOC_MMAP_THRESHOLD_": "65536", "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.diagnostics.frugal", tmp_path_factory.mktemp("pair")]
    ran = subprocess.run(
        [*command, json.dumps(limits)], cwd=ROOT, env=os.environ | plain, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_each_checkpoint_is_larger_than_all_that_any_command_may_take():
    assert max(STATED[name] for name in STREAMED) * frugal.LARGEST < frugal.CHECKPOINT


@pytest.mark.parametrize("name", STREAMED)
def test_a_command_keeps_to_the_copies_of_the_largest_matrix_that_the_docs_state(failures, name):
    assert failures[name] == ""


@pytest.mark.parametrize("name", ["load", "keep-mapped"])
def test_whoever_takes_a_whole_checkpoint_into_memory_is_stopped_by_the_same_limit(failures, name):
    assert re.search("alloc|memory", failures[name])
