"""The report opened in a browser: drawn, quiet, offline, and at home on every page."""

import json
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

pytestmark = pytest.mark.browser


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens an audit's report once it is drawn: the page, what it asked of the network, its complaints."""
    contexts = []

    def opened(audit, *, width=1440, dark=False):
        from diagnostics.report.render import write_html

        file = tmp_path / "report.html"
        write_html(audit, file)
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        page = context.new_page()
        asked, complaints = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(file.as_uri())
        page.wait_for_selector("html.drawn", timeout=60_000)
        return page, [url for url in asked if url != file.as_uri()], complaints

    yield opened
    for context in contexts:
        context.close()


def everything(result):
    """One of each kind of picture that an analysis draws, with the names it found in its tables."""
    from diagnostics.analyses.intruders.figures import draw
    from diagnostics.plotting import theme

    matrix = result.tables["matrices"]["matrix"][0]
    name = theme.verbatim(matrix)
    many = np.arange(20_000.0)
    bars = theme.figure(title=f"Bars of {matrix}", x="matrix", y="norm")
    dots = theme.figure(title="Many dots", x="step", y="loss (nats per token)")
    theme.threshold(dots, "limit", y=0.5)
    return {
        **draw(result),
        "bars": bars.add_bar(x=[name], y=[1.0], name=name, showlegend=True),
        "dots": dots.add_trace(go.Scattergl(x=many, y=np.sin(many), mode="markers")),
    }


@pytest.fixture
def audit(reported, intruder_tables, hostile_text):
    """An audit with every kind of picture, every kind of table, and names that mean harm."""
    from diagnostics.store.audit_store import Outcome

    return reported(
        metrics={"intruders": 6, "widest": 0.25},
        tables=intruder_tables(suffix=hostile_text),
        rules={"widest": {"fail": 0.1, "message": hostile_text, "source": hostile_text}},
        draw=everything,
        outcomes={"ood": Outcome(status="skipped", reason=hostile_text, question=hostile_text)},
        tuned={"ref": hostile_text * 3, "kind": "full", "fingerprint": "b2" * 32},
        unmatched=tuple(
            {"tensor": hostile_text, "reason": "r", "base_shape": [i], "tuned_shape": None} for i in range(30)
        ),
    )


def until(page, truth):
    """Wait until an expression holds; playwright's own waiting needs `eval`, which the page forbids."""
    for _ in range(200):
        if page.evaluate(truth):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never came true: {truth}")


PICTURES = ["where", "cosines", "sweep", "spectra", "similarity", "bars", "dots"]


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (800, True), (400, False)])
def test_the_page_draws_every_figure_offline_in_silence_and_within_its_width(opened, audit, width, dark):
    page, asked, complaints = opened(audit, width=width, dark=dark)
    assert complaints == []
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == []
    plots = page.locator(".plot").evaluate_all(
        """nodes => nodes.map(node => [
            node.dataset.name,
            node.querySelectorAll('.main-svg').length > 0,
            node.querySelectorAll('.trace, .hm, .bars path, .heatmaplayer image').length,
            node._fullLayout.paper_bgcolor,
        ])"""
    )
    assert [name for name, *_ in plots] == [f"angles-{name}" for name in PICTURES]
    assert all(svg and marks for _, svg, marks, _ in plots)
    assert {ground for *_, ground in plots} == {"#14181d" if dark else "#ffffff"}
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)"
    )


def test_names_that_mean_harm_are_shown_as_text(opened, audit, hostile_text):
    page, _, complaints = opened(audit)
    assert complaints == []
    assert page.title().startswith("fail: <script>")
    assert page.locator("main b, main img, header b, header img").count() == 0
    assert hostile_text in page.locator("#findings .message").inner_text()
    assert hostile_text in page.locator("#analysis-angles table.data").first.inner_text()
    bars = page.locator("#figure-angles-bars")
    assert hostile_text in bars.locator("figcaption").inner_text()
    assert hostile_text in bars.locator(".xtick text").first.text_content()
    assert hostile_text in bars.locator(".legendtext").first.text_content()
    # A hover label is drawn from what the figure holds of the tables.
    page.locator("#figure-angles-cosines .nsewdrag").first.scroll_into_view_if_needed()
    plot = "document.querySelector('#figure-angles-cosines .plot')"
    page.evaluate(f"Plotly.Fx.hover({plot}, [{{curveNumber: 0, pointNumber: 0}}])")
    assert hostile_text in page.locator("#figure-angles-cosines .hovertext").first.text_content()


def test_figures_follow_the_page_when_it_turns_dark_and_when_it_is_printed(opened, audit):
    page, _, complaints = opened(audit)
    grounds = "[...document.querySelectorAll('.plot')].map(plot => plot._fullLayout.paper_bgcolor)"
    widths = "[...document.querySelectorAll('.plot')].map(plot => plot._fullLayout.width)"
    before = page.evaluate(widths)
    page.emulate_media(color_scheme="dark")
    until(page, f"{grounds}.every(color => color === '#14181d')")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    until(page, f"{grounds}.every(color => color === '#ffffff')")
    assert max(page.evaluate(widths)) <= 680
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    until(page, f"{grounds}.every(color => color === '#14181d')")
    until(page, f"JSON.stringify({widths}) === '{json.dumps(before, separators=(',', ':'))}'")
    assert len(page.pdf(format="A4")) > 10_000
    assert complaints == []


def test_tables_unfold_and_sort_from_the_keyboard(opened, audit):
    page, _, _ = opened(audit)
    table = page.locator("#analysis-angles table.data").first  # `matrices`: 4 layers x 3 components
    rows = table.locator("tbody tr")
    assert rows.count() == 12
    assert table.locator("tbody tr:visible").count() == 8
    more = page.get_by_role("button", name="Show all 12 rows").first
    more.focus()
    page.keyboard.press("Enter")
    assert table.locator("tbody tr:visible").count() == 12

    heads = table.locator("thead th")
    column = heads.all_text_contents().index("min_cosine_low")
    heads.nth(column).get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert heads.nth(column).get_attribute("aria-sort") == "descending"
    shown = rows.locator(f"td:nth-child({column + 1})").all_text_contents()
    # Measured are q_proj and o_proj of layers 1 to 3; o_proj has intruders there, the nearest at 0.1.
    assert shown == ["0.95"] * 3 + ["0.1"] * 3 + ["–"] * 6
    page.keyboard.press("Enter")
    assert heads.nth(column).get_attribute("aria-sort") == "ascending"
    shown = rows.locator(f"td:nth-child({column + 1})").all_text_contents()
    assert shown == ["0.1"] * 3 + ["0.95"] * 3 + ["–"] * 6


def test_every_stop_of_the_keyboard_has_a_name(opened, audit):
    page, _, _ = opened(audit)
    unnamed = page.evaluate(
        """[...document.querySelectorAll('a[href], button, summary, [tabindex="0"]')]
           .filter(node => !(node.ariaLabel || node.textContent.trim() || node.dataset.title))
           .map(node => node.outerHTML)"""
    )
    assert unnamed == []


def test_without_scripts_the_page_still_reads(chromium, audit, tmp_path: Path):
    from diagnostics.report.render import write_html

    write_html(audit, tmp_path / "report.html")
    context = chromium.new_context(java_script_enabled=False, viewport={"width": 800, "height": 900})
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert "Figures need JavaScript" in page.inner_text("body")
    assert page.locator("#analysis-angles table.data tbody tr:visible").count() == 12
    context.close()
