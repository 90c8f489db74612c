"""The documentation: a page for each analysis, in step with the registry, and links that lead somewhere."""

import re
from pathlib import Path

import pytest

from diagnostics.core.registry import find, installed
from tests.analysis_pages import MARK, PAGES, page

ROOT = Path(__file__).parents[1]
SECTIONS = ("## What it measures", "## How to read it", "## What it cannot tell", "## Run it", "## Metrics")


def ours():
    return [name for name in installed() if find(name).function.__module__.startswith("diagnostics.")]


@pytest.mark.parametrize("name", ours())
def test_the_page_of_an_analysis_is_in_step_with_the_registry(name):
    file = PAGES / f"{name}.md"
    assert file.is_file(), f"write docs/analyses/{name}.md, then run: python -m tests.analysis_pages write"
    text = file.read_text(encoding="utf-8")
    assert find(name).question in text.partition(MARK)[0]
    assert [section for section in SECTIONS if section not in text] == []
    assert f"]({name}.png)" in text, (
        f"show its figure: python -m tests.analysis_pages figures draws {name}.png"
    )
    assert text == page(name), "run: python -m tests.analysis_pages write"


def documents():
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]


@pytest.mark.parametrize("file", documents(), ids=lambda file: str(file.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(file):
    links = re.findall(r"\]\(([^)#\s]+)", file.read_text(encoding="utf-8"))
    lost = [link for link in links if "://" not in link and not (file.parent / link).exists()]
    assert lost == []
