"""The report says what an audit holds, to people and to model cards, and shows what files say as text."""

import base64
import hashlib
import html
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from plotly.offline import get_plotlyjs

from diagnostics.report import content, render
from diagnostics.store.audit_store import Outcome, Store, load

WARN = {"widest": {"warn": 0.2, "fail": 1.0, "message": "it is wide", "source": "a ruler"}}
FAIL = {"widest": {"fail": 0.1, "message": "it is too wide", "source": "a ruler"}}


class Page(HTMLParser):
    """What a browser makes of a page: its elements with their attributes and text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1][0] in ("script", "style"):
            self.open[-1][2] += data
        else:
            for element in self.open:
                element[2] += data
            self.texts.append(data)

    def all(self, tag, **attributes):
        return [e for e in self.elements if e[0] == tag and attributes.items() <= e[1].items()]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def scatter(x, y):
    return lambda result: {
        "dots": go.Figure(go.Scatter(x=x, y=y, mode="markers"), layout={"title": {"text": "Dots"}})
    }


def test_the_page_begins_with_the_verdict_and_every_finding_with_its_source(reported):
    text = Page(render.to_html(reported(rules=WARN))).text
    assert text.index("tunescope audit warn") < text.index("it is wide") < text.index("How wide is it?")
    assert "1 warning, 0 failures (1 number judged)." in text
    assert "angles : widest is 0.25 , above 0.2" in text
    assert "Source: a ruler" in text


@pytest.mark.parametrize(
    ("rules", "failed", "verdict", "words"),
    [
        (FAIL, False, "fail", "0 warnings, 1 failure (1 number judged)."),
        (WARN, False, "warn", "1 warning, 0 failures (1 number judged)."),
        ({"widest": {"fail": 0.25}}, False, "pass", "0 warnings, 0 failures (1 number judged)."),
        ({}, False, "pass", "Nothing was judged: the policy has no threshold for what was measured."),
        (
            {"widest": {"below": True, "warn": 0.3}},
            False,
            "warn",
            "1 warning, 0 failures (1 number judged).",
        ),
        (
            {"widest": {"fail": 0.25}},
            True,
            "fail",
            "No result from broken; 0 warnings, 0 failures (1 number judged).",
        ),
    ],
)
def test_the_headline_counts_the_findings(reported, rules, failed, verdict, words):
    outcomes = {"broken": Outcome(status="failed", fault="crash", reason="it broke")} if failed else {}
    audit = reported(rules=rules, outcomes=outcomes)
    assert audit.verdict == verdict
    page = Page(render.to_html(audit))
    assert page.all("header", **{"class": f"verdict {verdict}"})
    assert words in page.text
    assert words in render.to_markdown(audit)


def test_each_number_stands_with_its_meaning_and_what_judges_it(reported):
    audit = reported(
        metrics={"widest": 0.25, "corners": 12_345},
        rules={"widest": {"warn": 0.2, "fail": 1.0, "per": "k", "source": "a ruler"}, "gone": {"warn": 1}},
    )
    widest, corners, gone = content.build_sections(audit)[0].metrics
    # per k: 0.2 and 1.0 times the parameter k = 10
    assert (widest.value, widest.verdict, widest.threshold) == ("0.25", "pass", "warn above 2, fail above 10")
    assert (widest.meaning, widest.source) == ("what widest says", "a ruler")
    assert (corners.value, corners.verdict, corners.threshold) == ("12,345", "", "")
    assert (gone.value, gone.threshold) == ("–", "no value: the analysis left it out")
    text = Page(render.to_html(audit)).text
    for word in ("what widest says", "warn above 2, fail above 10", "no value: the analysis left it out"):
        assert word in text
        assert word in render.to_markdown(audit)


def test_an_analysis_is_introduced_by_its_question_reading_notes_paper_and_parameters(reported):
    page = Page(render.to_html(reported(notes=("one corner was dropped",), parameters={})))
    for words in (
        "How wide is it?",
        "It is a quarter open.",
        "How to read it. 0 is closed, 1 is open.",
        "one corner was dropped",
        "Parameters: k 10, epsilon 0.5.",
        "Took 1.5 s on cpu, at most 321 MB of memory.",
    ):
        assert words in page.text
    assert page.all("a", href="https://arxiv.org/abs/0001.00001v2")


def test_notes_are_folded_but_there(reported):
    notes = tuple(f"note {i}" for i in range(20))
    page = Page(render.to_html(reported(notes=notes)))
    (folded,) = page.all("details", **{"class": "notes"})
    assert "open" not in folded[1]
    assert all(note in folded[2] for note in notes)
    assert "20 notes" in folded[2]
    assert all(f"- {note}\n" in render.to_markdown(reported(notes=notes)) for note in notes)


def test_what_was_compared_is_named_with_short_fingerprints_and_the_whole_ones_at_hand(reported):
    rows = {"task": [{"name": None, "ref": "task.jsonl", "fingerprint": "c3" * 32, "rows": 1200}]}
    page = Page(render.to_html(reported(data=rows, environment={"python": "3.12.1"}, options={"seed": 0})))
    for words in ("org/base", "runs/tuned", "1,234,567", "adapter r 8", "task.jsonl 1,200", "python 3.12.1"):
        assert words in page.text
    assert "a1a1a1a1a1a1…" in page.text
    full = [element[2] for element in page.all("code", **{"class": "whole"})]
    assert full == ["a1" * 32, "b2" * 32, "c3" * 32]


def test_what_did_not_run_says_which_option_would_enable_it(reported):
    outcomes = {
        "ood": Outcome(status="skipped", reason="give --task F and --ood F", question="Does it know?"),
        "broken": Outcome(status="failed", fault="crash", reason="ZeroDivisionError", question="Is it flat?"),
    }
    audit = reported(outcomes=outcomes)
    text = Page(render.to_html(audit)).text
    for words in ("skipped give --task F and --ood F Does it know?", "failed ZeroDivisionError Is it flat?"):
        assert words in text
    assert "- `ood` (skipped): give --task F and --ood F\n" in render.to_markdown(audit)


def test_unmatched_tensors_are_counted_and_listed(reported):
    unmatched = tuple(
        {"tensor": f"extra.{i}", "reason": "only in tuned", "base_shape": None, "tuned_shape": (i, 3)}
        for i in range(250)
    )
    page = Page(render.to_html(reported(unmatched=unmatched)))
    assert "250 tensors do not align; a tensor without a counterpart is in no number above." in page.text
    assert "extra.199 – 199 × 3 only in tuned" in page.text
    assert "extra.200" not in page.text
    assert "The first 200; audit.json lists all." in page.text
    assert "Unmatched" not in Page(render.to_html(reported())).text


def test_a_long_table_shows_the_rows_that_matter_first_and_says_where_the_rest_is(reported):
    frame = pd.DataFrame({"matrix": [f"m{i}" for i in range(300)], "widest": np.arange(300) / 300})
    head = content.table_heads(reported(tables={"matrices": frame}).results["angles"])[0]
    assert (head.total, len(head.rows), head.sorted_by) == (300, 200, ["widest"])
    assert [cell.text for cell in head.rows[0]] == ["m299", "0.9967"]  # 299 / 300
    text = Page(render.to_html(reported(tables={"matrices": frame}))).text
    assert "Largest widest first. The page holds the first 200 of 300 rows; all are in" in text
    assert "tables/angles.matrices.parquet" in text


def test_flagged_rows_come_first_and_a_short_table_stays_as_it_is():
    frame = pd.DataFrame({"layer": range(12), "straggler": [i == 7 for i in range(12)]})
    assert [row[0].text for row in content.table_head("a", "t", frame, ()).rows[:3]] == ["7", "0", "1"]
    assert [row[0].text for row in content.table_head("a", "t", frame.head(8), ()).rows[:3]] == [
        "0",
        "1",
        "2",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1_234_567, "1,234,567"),
        (0.123456, "0.1235"),
        (1e-7, "1e-07"),
        (12_345.678, "12,346"),
        (float("nan"), "–"),
        (float("inf"), "inf"),
        (None, "–"),
        (True, "yes"),
        ({"r": 8, "alpha": 16.0, "dora": None}, "r 8, alpha 16"),
        (["q_proj", "v_proj"], "q_proj, v_proj"),
        ((), ""),
        ("text", "text"),
    ],
)
def test_a_value_is_written_for_a_reader(value, text):
    assert content.format_number(value) == text


def test_cells_take_what_pandas_holds():
    frame = pd.DataFrame(
        {
            "int": pd.array([1, None], dtype="Int64"),
            "float": [np.nan, 0.5],
            "flag": [True, False],
            "name": ["a", None],
            "when": pd.to_datetime(["2026-01-02", None]),
        }
    )
    rows = content.table_head("a", "t", frame, ()).rows
    assert [cell.text for cell in rows[0]] == ["1", "–", "yes", "a", "2026-01-02 00:00:00"]
    assert [cell.text for cell in rows[1]] == ["–", "0.5", "no", "–", "–"]
    assert [cell.order for cell in rows[0]] == [1.0, None, 1.0, None, None]


def test_a_figure_travels_without_title_and_template_which_the_page_supplies(reported):
    page = Page(render.to_html(reported(draw=scatter([1, 2], [3, 4]))))
    assert [element[2].strip() for element in page.all("figcaption")] == ["Dots"]
    spec = json.loads(page.all("script", type="application/json")[0][2])
    assert spec["data"][0]["type"] == "scatter"
    assert {"title", "template"}.isdisjoint(spec["layout"])


def test_a_figure_of_many_points_is_thinned_and_says_so(reported):
    n = 200_000
    audit = reported(draw=scatter(np.arange(n), np.sin(np.arange(n))))
    text = render.to_html(audit)
    assert "5,000 of 200,000 points are drawn" in Page(text).text
    assert len(text) - len(get_plotlyjs()) < 300_000  # 5,000 points of 2 x 4 bytes, templates, styles


def test_the_markup_of_a_title_is_resolved_and_what_it_quotes_stays_text(reported):
    figure = go.Figure(layout={"title": {"text": "<b>two</b><br>lines of &lt;script&gt;"}})
    page = Page(render.to_html(reported(draw=lambda result: {"empty": figure})))
    assert page.all("figcaption")[0][2].strip() == "two lines of <script>"


def test_a_figure_that_cannot_be_drawn_costs_no_number(reported, caplog):
    def broken(result):
        return result.tables["none"]

    text = Page(render.to_html(reported(draw=broken))).text
    assert "Its figures could not be drawn (KeyError: 'none')." in text
    assert "widest 0.25" in text
    assert "angles: its figures cannot be drawn" in caplog.text


def test_an_audit_reads_where_its_analysis_is_not_installed(reported, registry):
    audit = reported(draw=scatter([1], [2]))
    audit = replace(
        audit, analyses={"angles": replace(audit.analyses["angles"], question="How wide?", paper="Euclid")}
    )
    registry.clear()
    text = Page(render.to_html(audit)).text
    assert "How wide?" in text
    assert "Method: Euclid." in text
    assert "widest 0.25" in text
    assert "Shown without figures and without the meaning of its numbers: unknown analysis 'angles'" in text
    assert "widest" in render.to_markdown(audit)


@pytest.fixture
def hostile(reported, hostile_text):
    """An audit in which every string that a file can supply tries to become markup."""
    bad = hostile_text
    return reported(
        tables={"matrices": pd.DataFrame({"matrix": [bad] * 2, bad: [1, 2]})},
        notes=(bad,),
        metrics={"widest": 0.25},
        rules={"widest": {"fail": 0.1, "message": bad, "source": bad}},
        draw=lambda result: {"bars": go.Figure(go.Bar(x=[bad], y=[1], name=bad))},
        outcomes={"ood": Outcome(status="skipped", reason=bad, question=bad)},
        base={"ref": bad, "kind": bad, "fingerprint": bad, "adapter": {bad: bad}},
        tuned={"ref": bad, "kind": bad, "fingerprint": None},
        data={bad: [{"name": bad, "ref": bad, "fingerprint": bad, "rows": 1}]},
        environment={bad: bad},
        unmatched=({"tensor": bad, "reason": bad, "base_shape": None, "tuned_shape": [1]},),
        created=bad,
        tunescope=bad,
    )


def test_no_string_of_an_audit_becomes_an_element_an_attribute_or_a_script(hostile, hostile_text):
    harmless = render.to_html(hostile).replace(html.escape(hostile_text), "x")
    page, expected = Page(render.to_html(hostile)), Page(harmless)
    assert page.text.count('<script>document.title="owned"</script>') >= 20
    assert [tag for tag, _, _ in page.elements] == [tag for tag, _, _ in expected.elements]
    assert {tag for tag, _, _ in page.elements}.isdisjoint({"img", "b"})
    assert not any(name.startswith("on") for _, attributes, _ in page.elements for name in attributes)
    bars = json.loads(page.all("script", type="application/json")[0][2])
    assert bars["data"][0]["x"] == [hostile_text]


def test_the_page_fetches_nothing_and_runs_its_own_two_scripts_alone(reported):
    page = Page(render.to_html(reported(draw=scatter([1], [2]))))
    links = {attributes.get("href", "#") for _, attributes, _ in page.elements}
    assert all(link.startswith(("#", "https://arxiv.org/abs/")) for link in links)
    assert not any({"src", "srcset", "poster", "data", "background"} & set(a) for _, a, _ in page.elements)
    assert not re.search(r"url\(|@import", "".join(style[2] for style in page.all("style")))
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][1]["content"]
    assert policy.startswith("default-src 'none'; img-src data: blob:;")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    scripts = [script[2] for script in page.all("script") if "type" not in script[1]]
    assert [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts] == allowed
    assert len(scripts) == 2


def test_plotly_is_embedded_once(reported):
    text = render.to_html(reported(draw=lambda r: {name: go.Figure(go.Bar(y=[1])) for name in "abc"}))
    assert len(text) < len(get_plotlyjs()) + 100_000


def test_masks_are_listed_with_what_to_do_with_them(reported):
    page = Page(render.to_html(reported(masks={"task": Path("masks/angles.task.safetensors")})))
    assert "masks/angles.task.safetensors" in page.text
    assert (
        "tunescope graft BASE TUNED --mask FILE --out DIR writes base with these entries of tuned"
        in page.text
    )
    assert "Masks" not in Page(render.to_html(reported())).text


def test_headings_go_down_one_level_at_a_time_and_every_link_leads_somewhere(reported):
    page = Page(render.to_html(reported(rules=WARN, tables={"t": pd.DataFrame({"a": [1]})})))
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    names = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    anchors = {e[1]["href"][1:] for e in page.all("a") if e[1]["href"].startswith("#")}
    assert anchors <= set(names)


def test_a_saved_audit_is_reported_as_the_fresh_one_was(reported, tmp_path):
    frame = pd.DataFrame({"matrix": ["a", "b"], "widest": [0.25, float("nan")]})
    audit = reported(rules=WARN, tables={"matrices": frame}, draw=scatter([1], [2]), path=tmp_path)
    with Store(tmp_path) as store:
        store.write_result("angles", audit.results["angles"])
        store.write(audit)
    again = load(tmp_path)
    assert render.to_html(again) == render.to_html(audit)
    assert render.to_markdown(again) == render.to_markdown(audit)
    assert render.to_json(again) == (tmp_path / "audit.json").read_text(encoding="utf-8")


def test_the_page_is_written_whole_or_not_at_all(reported, tmp_path):
    audit = reported()
    render.write_html(audit, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render.to_html(audit)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(OSError, match=r"cannot write .*report\.html"):
        render.write_html(audit, tmp_path / "absent" / "report.html")


# Markdown, against a renderer that is not ours.
RENDERER = MarkdownIt("commonmark").enable("table")


class Rendered(Page):
    """The page that a Markdown renderer makes."""

    def __init__(self, text):
        super().__init__(RENDERER.render(text))


def test_the_markdown_is_a_model_card_section_without_html(reported):
    audit = reported(
        rules=WARN,
        notes=("one corner was dropped",),
        outcomes={"ood": Outcome(status="skipped", reason="give --task F")},
        unmatched=({"tensor": "a", "reason": "r", "base_shape": None, "tuned_shape": None},),
    )
    text = render.to_markdown(audit)
    assert text.startswith("## tunescope: WARN\n")
    assert text.endswith("Measured with tunescope 0.1.0 on 2026-02-11; thresholds: a made-up policy.\n")
    assert "\n\n\n" not in text
    page = Rendered(text)
    assert [element[2] for element in page.all("h3")] == [
        "Findings",
        "How wide is it?",
        "Without a result",
        "About the comparison",
    ]
    assert len(page.all("table")) == 3
    assert "\nMeasured by `angles`, Euclid, arXiv:0001.00001v2; k 10, epsilon 0.5.\n" in text
    assert not re.search(r"<[a-z/!]", text)


def test_every_row_of_a_markdown_table_has_the_cells_of_its_head(hostile):
    page = Rendered(render.to_markdown(hostile))
    rows = [element[0] for element in page.elements if element[0] in ("tr", "th", "td")]
    counts = [
        len(cells) // 2 for cells in "".join("|" if tag == "tr" else "td" for tag in rows).split("|")[1:]
    ]
    # Two columns beside the row's name; six of a finding; four of a metric.
    assert set(counts) == {3, 6, 4}
    assert {tag for tag, _, _ in page.elements} <= {
        "h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "code", "strong",
    }  # fmt: skip
    assert page.text.count('<script>document.title="owned"</script>') >= 8


words = st.text(st.characters(exclude_categories=("C", "Z")) | st.sampled_from(" `_*[]()<>|\\~#&;!-+=.:1a$"))


@given(words)
def test_text_put_into_markdown_comes_out_as_it_went_in(text):
    shown = " ".join(text.split())
    assert Rendered(f"- x {render.escape_markdown(text)}").text == f"x {shown}".strip()
    assert Rendered(render.escape_markdown(text)).text == shown
    assert Rendered(
        f"| a | b |\n| - | - |\n| {render.escape_markdown(text)} | c |"
    ).text == f"a b {shown} c".replace("  ", " ")


@given(words)
def test_a_code_span_holds_any_text(text):
    shown = " ".join(text.split())
    assert [e[2].strip() for e in Rendered(f"x {render.code_span(text)} y").all("code")] == [shown]
    in_table = Rendered(f"| a | b |\n| - | - |\n| {render.table_cell(render.code_span(text))} | c |").all(
        "code"
    )
    assert [e[2].strip() for e in in_table] == [shown]


def test_of_many_numbers_the_first_and_the_judged_are_shown_and_the_others_fold():
    from diagnostics.report.content import Metric, leading_metrics

    many = [
        Metric(name=f"m{i}", value="1", meaning="", threshold="warn above 0" if i == 20 else "")
        for i in range(30)
    ]
    first, others = leading_metrics(many)
    assert [metric.name for metric in first] == [*(f"m{i}" for i in range(12)), "m20"]
    assert len(others) == 17
    assert leading_metrics(many[:16]) == (many[:16], [])


def test_of_many_thresholds_those_that_are_passed_fold():
    from diagnostics.report.content import Metric, leading_metrics

    many = [
        Metric(
            name=f"m{i}",
            value="1",
            meaning="",
            threshold="warn above 0",
            verdict="warn" if i == 20 else "pass",
        )
        for i in range(30)
    ]
    first, others = leading_metrics(many)
    assert [metric.name for metric in first] == [*(f"m{i}" for i in range(12)), "m20"]
    assert len(others) == 17
