"""Addresses, filters and tables of the dashboard, as values."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dashboard.invented import tables

WORDS = st.text(min_size=1)


@given(st.dictionaries(WORDS, st.lists(st.text(), min_size=1, max_size=3).map(tuple), max_size=4))
def test_an_address_says_what_it_was_made_of(values):
    from dashboard.state.query import Query, parse

    readable = {key: tuple(v.encode(errors="replace").decode() for v in held) for key, held in values.items()}
    query = Query({key.encode(errors="replace").decode(): held for key, held in readable.items()})
    assert parse(query.search) == query


def test_a_span_that_cannot_be_read_is_none():
    from dashboard.state.query import parse

    assert parse("?layer=3-17").span("layer") == (3, 17)
    assert parse("?layer=3").span("layer") == (3, 3)
    assert parse("?layer=x-y").span("layer") is None
    assert parse("").span("layer") is None


def test_filters_narrow_each_table_by_the_columns_that_it_has():
    from dashboard.state.filters import Filters
    from diagnostics.core.analysis import Result

    result = Result(metrics={}, tables=tables(layers=4, ranks=10))
    kept = Filters(layers=(1, 2), components=("o_proj",), groups=("g1",)).only(result).tables
    # two layers of one component: 2 matrices of 10 vectors; every second of 30 rows
    assert [len(kept[name]) for name in ("matrices", "vectors", "rows")] == [2, 20, 15]
    assert set(kept["vectors"]["layer"]) == {1, 2}
    assert Filters().only(result) is result


def test_what_is_of_no_group_stays_beside_the_groups_that_are_chosen():
    from dashboard.state.filters import Filters

    frame = pd.DataFrame({"group": ["a", "b", None], "auroc": [0.5, 0.75, 1.0]})
    assert list(Filters(groups=("a",)).rows(frame)["auroc"]) == [0.5, 1.0]


FRAME = pd.DataFrame(
    {"n": [3.0, 1.0, np.nan, 2.0], "text": ["b", "A", None, "ab"], "flag": [True, False, True, True]}
)


@pytest.mark.parametrize(
    ("request_", "left"),
    [
        ({"sortModel": [{"colId": "0", "sort": "desc"}]}, [0, 3, 1, 2]),
        ({"sortModel": [{"colId": "2", "sort": "asc"}, {"colId": "0", "sort": "asc"}]}, [1, 3, 0, 2]),
        ({"filterModel": {"0": {"type": "greaterThan", "filter": 1}}}, [0, 3]),
        ({"filterModel": {"0": {"type": "inRange", "filter": 0, "filterTo": 3}}}, [1, 3]),
        ({"filterModel": {"0": {"type": "blank"}}}, [2]),
        ({"filterModel": {"1": {"type": "contains", "filter": "a"}}}, [1, 3]),
        ({"filterModel": {"1": {"type": "contains", "filter": "("}}}, []),
        (
            {
                "filterModel": {
                    "0": {
                        "operator": "OR",
                        "conditions": [{"type": "lessThan", "filter": 2}, {"type": "equals", "filter": 3}],
                    }
                }
            },
            [0, 1],
        ),
        ({"filterModel": {"9": {"type": "contains", "filter": "a"}}}, [0, 1, 2, 3]),
    ],
)
def test_the_server_sorts_and_filters_a_table_as_its_heads_ask(request_, left):
    from dashboard.components.grids import selected

    assert list(selected(FRAME, request_).index) == left


def test_a_block_of_rows_is_text_and_comes_with_the_count_of_all():
    from dashboard.components.grids import response

    answer = response(FRAME, {"startRow": 1, "endRow": 3, "sortModel": [{"colId": "0", "sort": "asc"}]})
    # 1, 2, 3 and what was not measured: the second and third
    assert answer == {
        "rowData": [{"0": "2", "1": "ab", "2": "yes"}, {"0": "3", "1": "b", "2": "yes"}],
        "rowCount": 4,
    }


def test_no_text_of_a_saved_table_is_a_formula():
    from dashboard.components.grids import csv

    frame = pd.DataFrame({"token": ["=1+1", "-", "a=b", "@x", None], "=ratio": [-0.5, 1.0, 2.0, 3.0, 4.0]})
    lines = ["token,'=ratio", "'=1+1,-0.5", "'-,1.0", "a=b,2.0", "'@x,3.0", ",4.0"]
    assert csv(frame).splitlines() == lines


def test_a_request_that_makes_no_sense_gives_no_rows():
    from dashboard.components.grids import response

    assert response(FRAME, {"filterModel": {"0": {"type": "never", "filter": 1}}})["rowCount"] == 0


def test_a_cell_of_a_map_and_a_mark_of_a_matrix_are_both_found():
    from dashboard.state.drill import pointed

    matrices = {"a<b>"}
    assert pointed({"x": "3", "y": "q&lt;proj"}, ("layer", "component"), matrices) == {"cell": "3/q<proj"}
    assert pointed({"x": "q_proj", "y": 3}, ("component", "layer"), matrices) == {"cell": "3/q_proj"}
    assert pointed({"x": 1, "customdata": [7, "a&lt;b&gt;"]}, ("rank", "cosine"), matrices) == {
        "matrix": "a<b>"
    }
    assert pointed({"x": 1, "y": 2}, ("rank", "cosine"), matrices) == {}


def test_what_is_known_of_a_cell_are_the_rows_of_all_its_matrices(made_up, audit_of):
    from dashboard.state.drill import opened
    from dashboard.state.query import parse
    from tests.dashboard.invented import draw

    experts = pd.DataFrame(
        {
            "matrix": ["e.0", "e.1", "e.2"],
            "layer": [1, 1, 2],
            "component": ["up_proj"] * 3,
            "norm": [1.0, 2.0, 3.0],
        }
    )
    names = pd.DataFrame({"matrix": ["e.1", "e.1", "e.2"], "rank": [1, 2, 1]})
    audit = audit_of(made_up("angles", {"experts": experts, "names": names}, draw, {"widest": 0.25}))
    selection = opened(audit, parse("?cell=1/up_proj"))
    assert selection.matrices == ("e.0", "e.1")
    part = selection.of(audit.results["angles"])
    assert list(part.tables["experts"]["norm"]) == [1.0, 2.0]
    assert list(part.tables["names"]["rank"]) == [1, 2]
    assert opened(audit, parse("?matrix=e.2")).layer == "2"
    assert opened(audit, parse("?matrix=e.9")) is None
    assert opened(audit, parse("?cell=9/up_proj")) is None


def test_an_axis_over_steps_has_room_for_the_word_at_its_outermost_threshold():
    from dashboard.components.series_figure import padded_range

    # a fifth of 2 − 1 beyond both ends; half of a lone value; nothing that is not a number
    assert padded_range([1.0, 2.0, float("nan")]) == (0.8, 2.2)
    assert padded_range([4.0]) == (2.0, 6.0)
    assert padded_range([0.0]) == (-0.5, 0.5)
    assert padded_range([float("inf")]) == (0.0, 1.0)
