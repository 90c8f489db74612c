"""A row of text under the detector: its tokens coloured, and where it falls among the sets."""

import pandas as pd
import pytest

from dashboard.components import score_figure
from dashboard.pages.detector import options, pointed, row_text, standing, token_span
from dashboard.state.detector import Detector, detector
from dashboard.state.differences import signed
from dashboard.state.query import Query, parse
from diagnostics.core.analysis import Result
from tests.dashboard.browsing import until
from tests.dashboard.invented import HOSTILE

RATIOS = {"task": [-4.0, -3.0, -2.0, -1.0], "ood": [-2.5, 5.0]}


def result(name="foreign", words=("print", " the\n", "", HOSTILE)):
    """Four task rows and two OOD rows; the tokens of the first OOD row and of the last are kept."""
    rows = [
        {
            "set": name if role == "ood" else "own",
            "role": role,
            "row": i + 1,
            "ratio": ratio,
            "tokens": 4,
            "text": f"text {i} of {role}",
        }
        for role, ratios in RATIOS.items()
        for i, ratio in enumerate(ratios)
    ]
    tokens = [
        {"set": name, "row": row, "position": position, "token": word, "ratio": ratio}
        for row in (1, 2)
        for position, (word, ratio) in enumerate(zip(words, (-2.0, 0.5, 0.0, 1.0), strict=True))
    ]
    tables = {"rows": pd.DataFrame(rows), "tokens": pd.DataFrame(tokens)}
    return Result(metrics={}, tables=tables, analysis="ood", parameters={"examples": 1})


@pytest.fixture
def ood_detector():
    return Detector("ood", result())


def strings(component):
    """All text of a component."""
    if isinstance(component, str):
        return [component]
    if isinstance(component, list | tuple):
        return [text for child in component for text in strings(child)]
    return strings(getattr(component, "children", None) or [])


def test_the_most_foreign_ood_row_is_shown_unless_another_is_picked(ood_detector):
    assert ood_detector.key(ood_detector.selected(Query())) == "2 foreign"
    assert ood_detector.key(ood_detector.selected(parse("?row=3+own"))) == "3 own"
    # Rows that are not there: of another audit, or not a row at all.
    assert ood_detector.key(ood_detector.selected(parse("?row=9+own"))) == "2 foreign"
    assert ood_detector.key(ood_detector.selected(parse("?row=own"))) == "2 foreign"


def test_a_row_stands_above_its_share_of_every_set(ood_detector):
    row = ood_detector.selected(parse("?row=1+foreign"))
    # −2.5 is above −4 and −3 of the four task rows, and below the other OOD row
    assert ood_detector.shares_below(row, "ratio") == {"own": ("task", 0.5), "foreign": ("ood", 0.0)}
    text = "".join(strings(standing(ood_detector, row, "ratio")))
    assert (
        text == "Its ratio of -2.5 is higher than that of 50% of the own rows (task), "
        "0% of the other foreign rows."
    )


def test_rows_with_tokens_are_offered_first(ood_detector):
    assert [ood_detector.key(row) for _, row in ood_detector.offered.iterrows()] == [
        "2 foreign", "1 foreign", "4 own", "3 own", "2 own", "1 own",
    ]  # fmt: skip
    groups = options(ood_detector)
    assert [group["group"] for group in groups] == ["foreign (ood)", "own (task)"]
    assert groups[0]["items"][0]["label"] == "foreign 2, 5 nats: text 1 of ood"
    assert "no tokens recorded" in groups[1]["items"][0]["label"]


def test_a_row_whose_tokens_were_not_kept_says_how_to_keep_them(ood_detector):
    text = " ".join(strings(row_text(ood_detector, ood_detector.selected(parse("?row=1+own")), "ratio")))
    assert "text 0 of task" in text
    assert "--set ood.examples=N" in text


def test_a_token_is_the_stronger_coloured_the_further_from_nought():
    # half of what is shown at full strength, of which 60 % covers the page
    half = token_span("x", 1.0, 2.0)
    assert (half.style["--heat"], half.className, half.title) == ("30%", "token foreign strong", "+1 nats")
    assert token_span("x", -9.0, 2.0).style["--heat"] == "60%"
    assert token_span("x", -0.5, 2.0).className == "token learned"
    assert signed(-0.5) == "−0.5"
    assert signed(0.0) == "0"


def test_blanks_of_a_text_can_be_seen_and_break_its_lines():
    assert token_span(" the\n", 0.0, 1.0).children == " the⏎\n"
    assert token_span("", 0.0, 1.0).children == "·"


def test_a_click_picks_the_row_that_a_mark_stands_for():
    click = {"points": [{"customdata": ["3 a&lt;b", "text"]}]}
    assert parse(pointed(click, parse("?page=detector&score=ratio"))).value("row") == "3 a<b"
    assert pointed({"points": [{}]}, Query()) == pointed(None, Query()) == ""


def test_the_picture_keeps_both_ends_of_many_rows(monkeypatch):
    many = pd.DataFrame(
        {"set": "own", "role": "task", "row": range(1, 101), "ratio": range(100), "text": "t"}
    ).astype({"ratio": float})
    ood_detector = Detector(
        "ood", Result(metrics={}, tables={"rows": many, "tokens": result().tables["tokens"]})
    )
    monkeypatch.setattr(score_figure, "POINTS", 5)
    # five of a hundred in even steps of 24.75: 0, 24.75, 49.5, 74.25, 99
    assert score_figure.sample(ood_detector.rows, "ratio")["own"]["ratio"].tolist() == [0, 25, 50, 74, 99]


def test_only_results_with_scores_and_tokens_of_rows_make_a_detector(audit_of, made_up):
    made_up("ood", {}, lambda result: {}, {})
    assert detector(audit_of(result())).analysis == "ood"
    bare = Result(metrics={}, tables={"rows": result().tables["rows"]}, analysis="ood")
    assert detector(audit_of(bare)) is None
    empty = {name: table.head(0) for name, table in result().tables.items()}
    assert detector(audit_of(Result(metrics={}, tables=empty, analysis="ood"))) is None


@pytest.mark.browser
def test_a_row_is_read_and_another_picked_in_a_browser(visit, served, audit_of, made_up):
    from dashboard import create_app

    made_up("ood", {}, lambda result: {}, {})
    address = served(create_app({"one": audit_of(result()), "harm": audit_of(result(HOSTILE))}))
    tab = visit(address + "/?page=detector&audit=one")
    page = tab.page
    page.wait_for_selector(".text .token")
    assert page.locator(".text .token").all_text_contents() == ["print", " the⏎\n", "·", HOSTILE]
    assert page.locator(".text .token").nth(0).get_attribute("title") == "−2 nats"
    assert page.locator("main b, main img, main script").count() == 0
    shades = page.evaluate(
        "[...document.querySelectorAll('.text .token')].map((each) => getComputedStyle(each).backgroundColor)"
    )
    # Tokens at −2, 0.5, 0 and 1 nats, of which 2 is full strength: none of one shade with another.
    assert len(set(shades)) == 4
    assert tab.barriers() == []
    page.get_by_role("textbox", name="Text").click()
    page.get_by_role("option").nth(1).click()
    until(page, "document.querySelector('#text h2').textContent === 'foreign 1'")
    tab.settle()
    assert "row=1+foreign" in page.url
    mark = page.locator("#detector-scores .scatterlayer .trace").first.locator(".point").first
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    until(page, "document.querySelector('#text h2').textContent === 'own 1'")
    tab.settle()
    tab.go(address + "/?page=detector&audit=harm")
    page.wait_for_selector(".text .token")
    tab.settle()
    assert HOSTILE in page.inner_text("#text h2")
    assert page.locator("main b, main img, main script").count() == 0
