"""The page about adding an analysis runs as it stands, from one folder and one entry-point line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "adding-an-analysis.md").read_text(encoding="utf-8")
SCRIPT = """
import json, sys
from diagnostics.cli.main import main
from diagnostics.core.policy import default_policy
from diagnostics.store.audit_store import load

command, folder = json.loads(sys.argv[1]), sys.argv[2]
sys.argv = [*command, "--out", f"{folder}/audit", "--quiet", "--device", "cpu"]
try:
    main()
except SystemExit as left:
    code = left.code
audit = load(f"{folder}/audit")
result = audit.results["growth"]
figures = result.figures()
import diagnostics, pytest
tests = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:dash", f"{folder}/growth"])
print(json.dumps({
    "code": code, "tests": int(tests), "metrics": dict(result.metrics),
    "findings": [finding.metric for finding in audit.findings],
    "figures": {name: figure.layout.title.text for name, figure in figures.items()},
    "points": sum(len(trace.x) for trace in figures["growth"].data),
    "rules": default_policy().plain()["growth"],
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page's folder, and the metadata that installing its package would write."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "growth").mkdir()
    files = re.findall(r"^`growth/([\w.]+)`[^`]*(?:`[^`\n]+`[^`]*)*?```\w+\n(.*?)^```", PAGE, re.S | re.M)
    assert sorted(name for name, _ in files) == [
        "__init__.py",
        "analysis.py",
        "policy.toml",
        "test_growth.py",
    ]
    for name, text in files:
        (folder / "growth" / name).write_text(text, encoding="utf-8")
    metadata = folder / "growth-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: growth\nVersion: 1.0\n")
    [line] = re.findall(r'^\[project\.entry-points\."tunescope\.analyses"\]\n(.*)\n```', PAGE, re.M)
    (metadata / "entry_points.txt").write_text(f"[tunescope.analyses]\n{line.replace(chr(34), '')}\n")
    return folder


def test_the_page_runs_is_judged_drawn_and_tested(folder):
    [command] = re.findall(r"^\$ (tunescope audit .*)$", PAGE, re.M)
    path = os.pathsep.join(map(str, (folder, ROOT)))
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(command.split()), str(folder)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert (report["code"], report["tests"]) == (0, 0), process.stdout
    assert report["rules"]["largest"]["warn"] == 0.5
    assert report["findings"] == (["largest"] if report["metrics"]["largest"] > 0.5 else [])
    assert report["figures"] == {"growth": "Growth of every matrix"}
    assert report["points"] == report["metrics"]["matrices"] > 0


def test_the_places_that_the_page_names_exist():
    for file in re.findall(r"`([\w/]+\.(?:py|md))`", PAGE.partition("## In this package")[2]):
        assert (ROOT / file.replace("growth", "drift")).is_file(), file
