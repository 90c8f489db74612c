"""The chart helpers draw the columns of a frame, with text from a file as text."""

from types import SimpleNamespace

import numpy as np
import pandas as pd

from diagnostics.plotting import charts, theme
from diagnostics.plotting.charts import Style

TABLE = pd.DataFrame(
    {"step": [0, 1_000_001], "loss": [2.0, 1.0], "low": [1.5, 0.5], "high": [2.5, 1.25], "name": ["<b>", "b"]}
)


def blank():
    return theme.figure("<i>", "step", "loss, nats")


def test_a_hover_text_names_what_is_drawn_and_carries_other_columns_escaped():
    figure = charts.points(
        blank(), TABLE, "step", "loss", Style("a", "#000000"), "{name} {x}: {y:.2f} ({low})"
    )
    (trace,) = figure.data
    assert trace.hovertemplate == "%{customdata[0]} %{x}: %{y:.2f} (%{customdata[1]})"
    assert trace.customdata.tolist() == [["&lt;b&gt;", 1.5], ["b", 0.5]]
    assert figure.layout.title.text == "&lt;i&gt;"


def test_an_interval_is_a_ribbon_of_a_line_and_whiskers_of_points_and_bars():
    style, interval = Style("a", "#000000"), ("low", "high")
    ribbon, _ = charts.line(blank(), TABLE, "step", "loss", style, interval=interval).data
    assert list(ribbon.y) == [2.5, 1.25, 0.5, 1.5]  # along the upper ends and back along the lower
    for draw in (charts.points, charts.bars):
        error = draw(blank(), TABLE, "step", "loss", style, interval=interval).data[0].error_y
        assert (list(error.array), list(error.arrayminus)) == ([0.5, 0.25], [0.5, 0.5])


def test_a_heat_map_names_every_step_in_full_and_leaves_a_missing_cell_empty():
    cells = TABLE.assign(layer=[0, 1])
    (trace,) = charts.heat(blank(), cells, "step", "layer", "loss", "{y}: {z}").data
    assert list(trace.x) == ["0", "1000001"]
    np.testing.assert_array_equal(trace.z, [[2.0, np.nan], [np.nan, 1.0]])
    assert (trace.zmin, trace.zmax) == (0, 2.0)
    diverging = charts.heat(blank(), cells, "step", "layer", "loss", "", diverging=True).data[0]
    assert (diverging.zmin, diverging.zmax) == (-2.0, 2.0)


def test_a_figure_is_drawn_where_its_tables_have_rows():
    result = SimpleNamespace(tables={"steps": TABLE, "empty": TABLE[:0]})
    figures = charts.drawn(
        result,
        there=lambda steps, result: theme.figure(str(len(steps)), "", ""),
        without=lambda empty: blank(),
        optional=lambda steps, empty=None: blank() if empty is None else None,
        nothing=lambda steps: None,
    )
    assert list(figures) == ["there", "optional"]
    assert figures["there"].layout.title.text == "2"


def test_a_menu_changes_the_traces_alone_where_figures_differ_in_nothing_else():
    def figure(title):
        return theme.figure(title, "", "").add_scatter(x=[1], y=[1])

    assert charts.menu({"one": figure("a")}).layout.updatemenus == ()
    alike = charts.menu({"one": figure("a"), "two": figure("a")})
    assert [trace.visible for trace in alike.data] == [True, False]
    assert [(button.args[0], list(button.args[1])) for button in alike.layout.updatemenus[0].buttons] == [
        ("visible", [True, False]), ("visible", [False, True]),
    ]  # fmt: skip
    other = charts.menu({"one": figure("a"), "two": figure("b")}).layout.updatemenus[0].buttons[1]
    assert (other.method, other.args[1]["title.text"]) == ("update", "b")
