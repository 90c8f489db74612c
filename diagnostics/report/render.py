"""The report: one audit as an HTML page that opens offline, as Markdown for a model card, and as JSON.

Every string of an audit may come from a file: the page shows all of them as text, runs no script but its own,
and loads nothing; its content security policy holds it to that.
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
    """Write the audit as one self-contained page.

    Raises:
        OSError: it cannot be written; a page that was there is untouched.
    """
    with disk.replacing(Path(path)) as part:
        part.write_text(to_html(audit), encoding="utf-8")


def to_html(audit: Audit) -> str:
    """The audit as one page that needs no other file and no network."""
    from plotly.offline import get_plotlyjs

    sections = content.sections(audit)
    drawn = {section.name: content.pictures(section.result) for section in sections}
    # A browser hashes a script as it parsed it, and parsing makes one line feed of each line end.
    sources = (get_plotlyjs(), packaged("report.js"))
    scripts = [text.replace("\r\n", "\n").replace("\r", "\n") for text in sources]
    looks = {"light": theme.template(theme.LIGHT), "dark": theme.template(theme.DARK)}
    return (
        environment()
        .get_template("report.html")
        .render(
            **overview(audit, sections),
            pictures={name: made for name, (made, _) in drawn.items()},
            troubles={name: notes for name, (_, notes) in drawn.items()},
            mask_file=mask_file,
            tables={section.name: content.tables(section.result) for section in sections},
            looks=json.dumps({name: made.to_plotly_json() for name, made in looks.items()}),
            scripts=[Markup(text) for text in scripts],
            hashes=[base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts],
        )
    )


def to_markdown(audit: Audit) -> str:
    """The audit as Markdown that can be pasted into a model card: no HTML, no figures."""
    return environment().get_template("report.md").render(**overview(audit, content.sections(audit)))


def to_json(audit: Audit) -> str:
    """The audit as the text of audit.json."""
    return disk.to_json(audit.record())


def overview(audit: Audit, sections: list[content.Section]) -> dict[str, Any]:
    """What both forms are made of."""
    return {
        "audit": audit,
        "sections": sections,
        "headline": content.headline(audit, sections),
        "absent": {name: made for name, made in audit.analyses.items() if made.result is None},
    }


def environment() -> "jinja2.Environment":
    """The templates with their filters; HTML escapes all that is put into it, Markdown by `md` and `code`."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("diagnostics.report"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "number": content.number,
        "data": data_block,
        "md": markdown,
        "code": code,
        "cell": cell,
        "arxiv": arxiv,
    }
    made.globals |= {"theme": theme, "view": content, "packaged": packaged}
    return made


def packaged(name: str) -> str:
    """A file beside the templates."""
    return files("diagnostics.report").joinpath("templates", name).read_text(encoding="utf-8")


def data_block(text: str) -> Markup:
    """JSON as the content of a script element that is data: nothing in it can end the element."""
    return Markup(text.replace("<", r"\u003c"))


def arxiv(paper: str) -> str:
    """The address of the arXiv paper that a citation names; empty when it names none."""
    found = re.search(r"arXiv:\s*(\d{4}\.\d{4,5}(?:v\d+)?)", paper, flags=re.IGNORECASE)
    return f"https://arxiv.org/abs/{found[1]}" if found else ""


def markdown(text: object) -> str:
    """Text that Markdown shows as it is, on one line, also inside a table."""
    words = " ".join(str(text).split())
    words = re.sub(r"([\\`*\[\]<>|~#&$!]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", words)
    # What else would begin a list or a heading.
    return re.sub(r"^(?=[-+=])|^(\d+)(?=[.)](?:\s|$))", r"\1\\", words)


def code(text: object) -> str:
    """Text as a Markdown code span on one line."""
    words = " ".join(str(text).split()) or " "
    fence = "`" * (max(map(len, re.findall("`+", words)), default=0) + 1)
    space = " " if "`" in words else ""
    return f"{fence}{space}{words}{space}{fence}"


def cell(span: str) -> str:
    """A code span inside a Markdown table, where a bar would end the cell."""
    return span.replace("|", r"\|")
