"""The report: one audit as an HTML page that opens offline, as Markdown for a model card, and as JSON.

Every string of an audit may come from a file. The page shows them as text, runs only its own scripts, and
loads nothing; its content security policy enforces that.
"""

import base64
import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from diagnostics.plotting import theme
from diagnostics.report import content
from diagnostics.store import files as disk
from diagnostics.store.audit_store import Audit, mask_file

if TYPE_CHECKING:
    import jinja2


def write_html(audit: Audit, path: str | Path) -> None:
    """Write the audit as one self-contained page; an error leaves an earlier page untouched."""
    with disk.replacing(Path(path)) as part:
        part.write_text(to_html(audit), encoding="utf-8")


def to_html(audit: Audit) -> str:
    """The audit as one page without other files or network access."""
    from plotly.offline import get_plotlyjs

    sections = content.build_sections(audit)
    figures = {section.name: content.embedded_figures(section.result) for section in sections}
    # The browser hashes the parsed script, in which every line end is one line feed.
    sources = (get_plotlyjs(), template_text("report.js"))
    scripts = [text.replace("\r\n", "\n").replace("\r", "\n") for text in sources]
    templates = {"light": theme.template(theme.LIGHT), "dark": theme.template(theme.DARK)}
    return template_environment().get_template("report.html").render(
        **shared_context(audit, sections), mask_file=mask_file,
        pictures={name: embedded for name, (embedded, _) in figures.items()},
        drawing_notes={name: notes for name, (_, notes) in figures.items()},
        tables={section.name: content.table_heads(section.result) for section in sections},
        looks=json.dumps({name: template.to_plotly_json() for name, template in templates.items()}),
        scripts=[Markup(text) for text in scripts],
        hashes=[base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts],
    )  # fmt: skip


def to_markdown(audit: Audit) -> str:
    """The audit as Markdown for a model card: no HTML, no figures."""
    template = template_environment().get_template("report.md")
    return template.render(**shared_context(audit, content.build_sections(audit)))


def to_json(audit: Audit) -> str:
    """The audit as the text of audit.json."""
    return disk.to_json(audit.record())


def shared_context(audit: Audit, sections: list[content.Section]) -> dict[str, Any]:
    """The variables of both templates."""
    return {
        "audit": audit,
        "sections": sections,
        "headline": content.sentence(content.count_findings(audit)),
        "absent": {name: outcome for name, outcome in audit.analyses.items() if outcome.result is None},
    }


def template_environment() -> "jinja2.Environment":
    """The templates; in HTML every value is escaped, in Markdown those with the filters `md` and `code`."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("diagnostics.report"),
        autoescape=lambda name: name is not None and name.endswith(".html"), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    templates.filters |= {"number": content.format_number, "data": script_data, "arxiv": arxiv_url}
    templates.filters |= {"md": escape_markdown, "code": code_span, "cell": table_cell}
    templates.globals |= {"theme": theme, "view": content, "template_text": template_text}
    return templates


def template_text(name: str) -> str:
    """A file in the folder of templates."""
    return files("diagnostics.report").joinpath("templates", name).read_text(encoding="utf-8")


def script_data(text: str) -> Markup:
    """JSON as the content of a script element; nothing in it can end the element."""
    return Markup(text.replace("<", r"\u003c"))


def arxiv_url(paper: str) -> str:
    """The URL of the arXiv paper in a citation; empty without one."""
    number = re.search(r"arXiv:\s*(\d{4}\.\d{4,5}(?:v\d+)?)", paper, flags=re.IGNORECASE)
    return f"https://arxiv.org/abs/{number[1]}" if number else ""


def escape_markdown(text: object) -> str:
    """Text escaped so that Markdown shows it unchanged, on one line, also inside a table."""
    words = " ".join(str(text).split())
    words = re.sub(r"([\\`*\[\]<>|~#&$!]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", words)
    # These would begin a list or a heading.
    return re.sub(r"^(?=[-+=])|^(\d+)(?=[.)](?:\s|$))", r"\1\\", words)


def code_span(text: object) -> str:
    """Text as a Markdown code span on one line."""
    words = " ".join(str(text).split()) or " "
    fence = "`" * (max(map(len, re.findall("`+", words)), default=0) + 1)
    space = " " if "`" in words else ""
    return f"{fence}{space}{words}{space}{fence}"


def table_cell(span: str) -> str:
    """A code span for a Markdown table, where a bar would end the cell."""
    return span.replace("|", r"\|")
