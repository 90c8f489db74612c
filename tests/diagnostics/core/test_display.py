"""A result is short in a console and in a notebook, and shows no markup of its own."""

import pandas as pd

from diagnostics.core.analysis import Result
from tests.reference import results


def result(**changes):
    tables = {"wide": pd.DataFrame([range(7)] * 3)}
    return Result(**{"metrics": {"first": 1234567, "second": 0.1234567}, "tables": tables, **changes})


def test_a_text_holds_metrics_and_shapes_in_a_few_lines():
    assert repr(result()).splitlines() == [
        "Result of no analysis",
        "  metrics: first 1,234,567, second 0.123457",
        "  tables: wide 3 x 7",
    ]


def test_only_the_first_metrics_and_notes_are_shown_with_the_count_of_the_others():
    long = result(
        metrics={f"m{i}": i for i in range(20)},
        tables={f"t{i}": pd.DataFrame({"a": range(100_000)}) for i in range(3)},
        notes=tuple(f"note {i} " + "x" * 500 for i in range(9)),
    )
    text, html = repr(long), long._repr_html_()
    for shown in (text, html):
        assert "m11" in shown
        assert "m12" not in shown
        assert "and 8 more" in shown
        assert "and 6 more notes" in shown
        assert "100,000 x 1" in shown
        assert len(shown) < 3000
    assert len(text.splitlines()) < 15


def test_markup_in_names_and_notes_is_shown_as_text():
    shown = result(metrics={"<b>": 1}, notes=("<script>alert(1)</script>",))._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "&lt;b&gt;" in shown


def test_a_measured_result_names_its_question_summary_and_the_meaning_of_its_metrics():
    _, _, measured = next(results(("drift",)))
    text, html = repr(measured), measured._repr_html_()
    assert measured.summary() in text
    assert measured.summary() in html
    assert "lowest RSA of the keep rows at any layer" in html
    assert len(text.splitlines()) < 15
    assert len(html) < 6000


def test_a_result_without_the_tables_of_its_summary_is_shown_all_the_same():
    bare = Result(metrics={}, tables={}, analysis="intruders")
    assert "Did tuning add" in repr(bare)
    assert "Did tuning add" in bare._repr_html_()
