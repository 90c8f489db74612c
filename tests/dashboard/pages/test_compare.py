"""Audits side by side: what differs, whose axes are shared, and how it looks in a browser."""

import base64
import json
import struct
from dataclasses import replace

import pytest

from dashboard.components.figure_panels import figure_panels, united
from dashboard.state.differences import cautions, measure, measures, shared_findings
from tests.dashboard.browsing import until
from tests.dashboard.invented import HOSTILE, draw, tables


def spec(*, y=(0.0, 1.0), title="cosine", **layout):
    """A figure as plotly.js draws it: one line, a threshold, a note in its corner."""
    shape = {"type": "line", "xref": "x domain", "yref": "y", "x0": 0, "x1": 1, "y0": 0.5, "y1": 0.5}
    note = {"text": "corner", "xref": "paper", "yref": "paper", "x": 1, "y": 0}
    return {
        "data": [{"type": "scatter", "name": "line", "x": [0, 1], "y": list(y)}],
        "layout": {
            "xaxis": {"title": {"text": "rank"}},
            "yaxis": {"title": {"text": title}, "range": list(y)},
            "shapes": [shape],
            "annotations": [note],
            **layout,
        },
    }


def joint(*specs, columns=2):
    named = {f"audit {i}": figure for i, figure in enumerate(specs)}
    return figure_panels(named, dict.fromkeys(named, 400), columns)


def test_panels_stand_on_axes_that_hold_what_each_shows():
    joined = joint(spec(y=(0.0, 2.0)), spec(y=(-1.0, 1.0)))
    layout = joined["layout"]
    assert [trace["xaxis"] + trace["yaxis"] for trace in joined["data"]] == ["xy", "x11y11"]
    assert layout["xaxis11"]["matches"] == "x"
    assert layout["yaxis11"]["matches"] == "y"
    # from the lower of both ends to the higher
    assert layout["yaxis"]["range"] == layout["yaxis11"]["range"] == [-1.0, 2.0]
    # two panels with 3 % of the width between them
    assert layout["xaxis"]["domain"] == pytest.approx([0, 0.485])
    assert layout["xaxis11"]["domain"] == pytest.approx([0.515, 1])
    assert layout["yaxis11"]["showticklabels"] is False


def test_axes_that_measure_something_else_are_left_apart():
    layout = joint(spec(title="cosine"), spec(title="nats"))["layout"]
    assert "matches" not in layout["yaxis11"]
    assert layout["yaxis11"]["title"]["text"] == "nats"
    assert layout["xaxis11"]["matches"] == "x"


def test_logarithmic_axes_hold_what_is_drawn_and_little_more():
    panels = []
    for low, high in ((0.1, 1.0), (0.5, 10.0)):
        panel = spec(y=(low, high))
        panel["layout"]["yaxis"] = {"title": {"text": "value"}, "type": "log"}
        panels.append(panel)
    panels[1]["data"][0]["y"] = {
        "dtype": "f8",
        "bdata": base64.b64encode(struct.pack("<3d", 0.5, 10, 0)).decode(),
    }
    layout = joint(*panels)["layout"]
    # 0.1 to 10 are the powers -1 to 1, with a twentieth more at both ends; 0 is on no such axis
    assert layout["yaxis"]["range"] == layout["yaxis11"]["range"] == pytest.approx([-1.1, 1.1])


def test_long_titles_of_narrow_panels_take_two_lines_and_the_room_for_them():
    long = {"title": {"text": "epsilon: |cosine| under which a direction is new"}}
    beside_each_other = joint(spec(xaxis=long), spec(xaxis=long))["layout"]
    assert (
        beside_each_other["xaxis"]["title"]["text"] == "epsilon: |cosine| under which a<br>direction is new"
    )
    assert beside_each_other["margin"]["b"] == 56 + 18
    alone = joint(spec(xaxis=long), spec(xaxis=long), columns=1)["layout"]
    assert alone["xaxis"]["title"] == long["title"]
    assert alone["margin"]["b"] == 56


def test_a_name_stands_above_the_marks_over_its_panel():
    mark = {"text": "▼", "xref": "x", "yref": "paper", "x": 1, "y": 1, "yanchor": "bottom"}
    notes = joint(spec(annotations=[mark]), spec())["layout"]["annotations"]
    shifts = {note["text"]: note["yshift"] for note in notes if "yshift" in note}
    assert shifts == {"<b>audit 0</b>": 20, "<b>audit 1</b>": 5}


def test_panels_that_do_not_fit_beside_stand_below():
    layout = joint(spec(), spec(), spec(), columns=2)["layout"]
    # inner height 400 - 76 - 56 = 268; two rows of it and 104 between them
    assert layout["height"] == 2 * 268 + 104 + 76 + 56
    assert layout["yaxis21"]["domain"] == pytest.approx([0, 268 / 640])
    assert layout["yaxis"]["domain"] == pytest.approx([1 - 268 / 640, 1])
    assert layout["xaxis21"]["domain"] == layout["xaxis"]["domain"]


def test_marks_and_notes_move_with_their_panel():
    layout = joint(spec(), spec())["layout"]
    second = layout["shapes"][1]
    assert (second["xref"], second["yref"], second["x1"]) == ("x11 domain", "y11", 1)
    corners = [note for note in layout["annotations"] if note["text"] == "corner"]
    # the right edge of the first panel, and that of the second
    assert [note["x"] for note in corners] == pytest.approx([0.485, 1.0])
    heads = [note["text"] for note in layout["annotations"] if note["text"] != "corner"]
    assert heads == ["<b>audit 0</b>", "<b>audit 1</b>"]


def test_the_name_of_an_audit_is_text_above_its_panel():
    joined = figure_panels({HOSTILE: spec(), "b": spec()}, {HOSTILE: 400, "b": 400}, 2)
    assert "<script>" not in json.dumps(joined)


def test_maps_share_one_scale_of_colours_that_holds_both():
    first = {"data": [{"type": "heatmap", "z": [[1]], "zmin": 0, "zmax": 3}], "layout": {}}
    second = {"data": [{"type": "heatmap", "z": [[1]], "zmin": -2, "zmax": 1}], "layout": {}}
    joined = joint(first, second)
    scales = {trace["coloraxis"] for trace in joined["data"]}
    assert scales == {"coloraxis2"}
    assert (joined["layout"]["coloraxis2"]["cmin"], joined["layout"]["coloraxis2"]["cmax"]) == (-2, 3)


def test_a_legend_names_what_panels_have_in_common_once():
    two = {"data": [*spec()["data"], {"type": "scatter", "name": "other", "x": [0], "y": [0]}], "layout": {}}
    joined = joint(two, two)
    assert [trace["showlegend"] for trace in joined["data"]] == [True, True, False, False]
    assert [trace["legendgroup"] for trace in joined["data"]] == ["line", "other"] * 2


def test_a_choice_that_each_figure_offers_becomes_one_over_all_panels():
    def chosen(label):
        button = {"label": label, "method": "restyle", "args": ["visible", [True]]}
        return spec(updatemenus=[{"type": "dropdown", "buttons": [button]}])

    assert joint(chosen("base"), chosen("base"))["layout"]["updatemenus"][0]["buttons"][0]["args"] == [
        "visible",
        [True, True],
    ]
    assert joint(chosen("base"), chosen("tuned")) is None


def test_a_range_backwards_stays_so():
    assert united([[5.5, -0.5], [9.5, -0.5]]) == [9.5, -0.5]
    assert united([[0, 1], None]) is None


def test_a_number_is_marked_when_it_lies_far_off_or_is_judged_otherwise():
    # 11 is within a tenth of the larger of 10 (0.0909); 12 is not (0.167)
    assert measure(11.0, "", 10.0, "").marked == ""
    assert measure(11.0, "", 10.0, "").change == "+1"
    assert measure(12.0, "", 10.0, "").marked == "up"
    assert measure(8.0, "", 10.0, "").change == "−2"
    assert measure(8.0, "", 10.0, "").marked == "down"
    assert measure(10.5, "fail", 10.0, "pass").marked == "verdict"
    assert not measure(10.0, "pass", 10.0, "pass").differs
    assert measure(None, "", 10.0, "").differs
    assert measure(float("nan"), "", 10.0, "").text == "–"


@pytest.fixture(scope="module")
def audits(made_up, audit_of):
    """Two audits of other numbers, judged by one rule that only the second is beyond, and of other rows."""
    rules = {"angles": {"widest": {"warn": 0.5, "message": "too wide"}, "narrowest": {"fail": 0.01}}}
    first = made_up("angles", tables(), draw, {"widest": 0.25, "narrowest": 0.125})
    second = made_up("angles", tables(layers=6), draw, {"widest": 0.75, "narrowest": 0.125, "more": 3.0})
    rows = {"task": [{"name": "task", "ref": "task.jsonl", "rows": 3, "fingerprint": "aa"}]}
    other = {"task": [{"name": "task", "ref": "task.jsonl", "rows": 3, "fingerprint": "bb"}]}
    return {
        "one": audit_of(first, rules=rules, data=rows),
        "two": audit_of(second, rules=rules, data=other, base={"ref": "org/other", "fingerprint": "b2"}),
    }


def test_findings_of_one_audit_alone_come_first_and_say_why_the_other_lacks_them(audits):
    listed = shared_findings(audits)
    assert [shared.metric for shared in listed] == ["widest", "narrowest"]
    assert [finding is None for finding in listed[0].findings] == [True, False]
    assert listed[0].reasons == ["0.25, passes", ""]
    assert all(listed[1].findings)


def test_numbers_stand_beside_those_of_the_first_audit(audits):
    numbers = measures(audits)
    assert list(numbers) == [("angles", "widest"), ("angles", "narrowest"), ("angles", "more")]
    assert [value.text for value in numbers["angles", "widest"]] == ["0.25", "0.75"]
    assert numbers["angles", "widest"][1].change == "+0.5"
    assert numbers["angles", "widest"][1].marked == "verdict"
    assert [value.text for value in numbers["angles", "more"]] == ["–", "3"]


def test_what_spoils_the_comparison_is_said(audits):
    text = " ".join(cautions(audits))
    assert "The bases differ" in text
    assert "The task rows differ" in text
    assert cautions({"one": audits["one"], "again": audits["one"]}) == []


def test_other_settings_of_an_analysis_are_one_line(audits):
    result = audits["one"].results["angles"]
    outcome = audits["one"].analyses["angles"]
    other = replace(result, parameters={"k": 20, "epsilon": 0.25})
    again = replace(audits["one"], analyses={"angles": replace(outcome, result=other)})
    lines = cautions({"one": audits["one"], "again": again})
    assert lines == ["angles was run with different settings: k is 10 or 20, epsilon is – or 0.25."]


@pytest.mark.browser
def test_two_audits_are_compared_in_a_browser(visit, served, audits, audit_of):
    from dashboard import create_app

    hostile = audit_of(audits["one"].results["angles"], tuned={"ref": HOSTILE}, base={"ref": HOSTILE})
    address = served(create_app({**audits, "third": hostile}))
    tab = visit(address + "/?page=compare&of=one&of=two")
    page = tab.page
    page.wait_for_selector("#same-figures figure")
    tab.settle()
    assert "only two" in page.inner_text("#findings tbody tr:first-child")
    first = page.locator("#numbers tbody tr").first
    assert [cell.split() for cell in first.locator("td").all_inner_texts()] == [
        ["0.25"],
        ["warn", "0.75", "◆", "+0.5"],
    ]
    assert first.locator(".differs").count() == 1
    assert tab.barriers() == []

    # Both panels of the map end at the same layer, although one audit has four layers and the other six.
    ranges = page.evaluate(
        "[...document.querySelectorAll('#same-figures .js-plotly-plot')].map((plot) => "
        "[plot._fullLayout.xaxis.range, plot._fullLayout.xaxis11.range])"
    )
    assert all(left == right for left, right in ranges)
    assert len(ranges) == 2

    page.get_by_role("textbox", name="Show").click()
    page.get_by_role("option", name="numbers that differ").click()
    until(page, "document.querySelectorAll('#numbers tbody tr').length === 2")
    assert "rows=different" in page.url
    page.get_by_role("textbox", name="Audits").click()
    page.get_by_role("option", name="third").click()
    until(page, "document.querySelectorAll('#side-by-side .card').length === 3")
    tab.settle()
    assert page.locator("main b, main img, main script").count() == 0
    assert HOSTILE in page.inner_text("#side-by-side .cards")
    page.go_back()
    until(page, "document.querySelectorAll('#side-by-side .card').length === 2")
    tab.settle()
