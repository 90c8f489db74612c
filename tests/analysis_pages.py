"""The pages `docs/analyses/NAME.md`: writes what the registry knows into them, and draws their figures.

    python -m tests.analysis_pages write      # the part below the mark, of every page
    python -m tests.analysis_pages figures    # NAME.png, from the bundled models; needs Chromium and minutes

What stands above the mark is written by hand.
"""

import inspect
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from diagnostics import default_policy, installed_analyses
from diagnostics.core.inputs import OPTIONS

PAGES = Path(__file__).parents[1] / "docs" / "analyses"
MARK = "<!-- From the registry: python -m tests.analysis_pages write -->"
# The model, and the figure that answers the question best.
FIGURES = {
    "drift": ("lora-r8", "rsa"),
    "dynamics": ("parity", "strip"),
    "integrity": ("full", "changed"),
    "intruders": ("lora-r8", "where"),
    "mitigation": ("lora-r8", "retention"),
    "ood": ("lora-r8", "densities"),
    "path": ("lora-r8", "loss"),
    "pathways": ("parity", "steps"),
    "sharpness": ("lora-r8", "barriers"),
    "skills": ("full", "curve"),
    "sparsification": ("parity", "sparseness"),
    "sparsity": ("lora-r8", "keep_curve"),
    "trajectory": ("parity", "metric"),
}


def generated(name: str) -> str:
    """What the registry and the default policy know of an analysis, as Markdown."""
    record = installed_analyses()[name]
    about = record.describe()
    needs, uses = (
        " and ".join(f"`{OPTIONS[role]}`" for role in roles) for roles in (record.inputs, record.optional)
    )
    meanings = explained(record.function)
    parameters = [
        (f"`{key}`", f"`{show(value)}`", meanings.get(key, "")) for key, value in about["parameters"].items()
    ]
    metrics = [(f"`{metric}`", meaning) for metric, meaning in about["metrics"].items()]
    rules = default_policy().rules.get(name, {})
    lines = [
        MARK,
        "",
        "## Run it",
        "",
        f"Needs {needs}{f'; uses {uses}' if uses else ''}.",
        f"From Python: `diagnostics.{record.function.__name__}`.",
        "",
        f"Cost: {about['cost']}.",
        "",
        f"Source: {source(about['paper'])}.",
        "",
        *table((f"`--set {name}.…`", "default", "meaning"), parameters),
        "",
        "## Metrics",
        "",
        *table(("metric", "meaning"), metrics),
    ]
    if rules:
        thresholds = [
            (f"`{metric}`", bounds(rule), rule.message, rule.source) for metric, rule in rules.items()
        ]
        lines += [
            "",
            "## Default thresholds",
            "",
            *table(("metric", "threshold", "finding", "source"), thresholds),
        ]
    return "\n".join(lines) + "\n"


def explained(function: Any) -> dict[str, str]:
    """The parameters of a function, as the `Args` of its docstring explain them."""
    arguments = re.search(r"^Args:\n(.*?)(?:\n\S|\Z)", inspect.getdoc(function) or "", re.S | re.M)
    meanings = {}
    for entry in re.split(r"\n(?=    \S)", arguments[1] if arguments else ""):
        names, _, text = " ".join(entry.split()).partition(": ")
        meanings |= dict.fromkeys(names.split(", "), text)
    return meanings


def source(paper: str) -> str:
    """A paper as a link where it has an arXiv number."""
    number = paper.removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{number})" if paper.startswith("arXiv:") else paper


def show(value: Any) -> str:
    """A default as a person writes it for `--set`."""
    if isinstance(value, list):
        return ",".join(map(show, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def bounds(rule: Any) -> str:
    """The thresholds of a rule in words."""
    side = "below" if rule.below else "above"
    return ", ".join(
        f"{severity} {side} {bound:g}"
        for severity, bound in (("warn", rule.warn), ("fail", rule.fail))
        if bound is not None
    )  # fmt: skip


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *escaped]]


def page(name: str) -> str:
    """The page as it should be: what stands above the mark, and below it what is generated."""
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    return text.partition(MARK)[0].rstrip() + "\n\n" + generated(name)


def figures() -> None:
    """Draw the figure of every page."""
    from playwright.sync_api import sync_playwright

    from tests.reference import results

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as directory:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        sheet = browser.new_page(viewport={"width": 900, "height": 480}, device_scale_factor=1.5)
        for model, analysis, result in results():
            if FIGURES[analysis][0] != model:
                continue
            figure = result.figures()[FIGURES[analysis][1]]
            html = Path(directory) / f"{analysis}.html"
            figure.update_layout(width=880).write_html(html, config={"displayModeBar": False})
            sheet.goto(html.as_uri())
            sheet.locator(".plot-container").screenshot(path=PAGES / f"{analysis}.png")
        browser.close()


def main(arguments: list[str]) -> int:
    """`write` or `figures`."""
    if arguments == ["write"]:
        for name in installed_analyses():
            (PAGES / f"{name}.md").write_text(page(name), encoding="utf-8")
        return 0
    if arguments == ["figures"]:
        figures()
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
