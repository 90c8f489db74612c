"""Figures are thinned without losing what matters in them."""

import numpy as np
import plotly.graph_objects as go
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.report.thinning import LIMIT, points_per_trace, thin_traces


def light(figure, limit=LIMIT):
    """The figure of thinned traces, the points drawn, and the points before."""
    traces, drawn, total = thin_traces(figure, limit)
    return go.Figure(data=traces, layout=figure.layout), drawn, total


def test_a_small_figure_keeps_every_point():
    figure = go.Figure(go.Scatter(x=[1, 2, 3], y=[4.0, 5.0, 6.0]))
    thinned, drawn, total = light(figure, limit=3)
    assert (drawn, total) == (3, 3)
    assert thinned.data[0].y == (4.0, 5.0, 6.0)


def test_an_outlier_survives_among_a_hundred_thousand_points():
    generator = np.random.default_rng(0)
    y = generator.normal(1.0, 0.01, 100_000)
    y[77_777] = 0.1
    thinned, drawn, total = light(go.Figure(go.Scatter(y=y, mode="markers")), limit=1_000)
    assert (drawn, total) == (1_000, 100_000)
    assert np.float32(0.1) in thinned.data[0].y


def test_what_belongs_to_a_point_stays_with_it():
    n = 400
    point = np.arange(n)
    figure = go.Figure(
        go.Scatter(
            x=point,
            y=(point * 7919) % n,
            text=[f"point {i}" for i in point],
            customdata=[[i, f"name {i}"] for i in point],
            marker={"size": list(range(n))},
            error_y={"array": point / 2.0},
        )
    )
    trace = light(figure, limit=50)[0].data[0]
    kept = [int(text.split()[1]) for text in trace.text]
    assert len(kept) == 50
    assert kept == sorted(kept)
    assert list(trace.x) == kept
    assert list(trace.y) == [(i * 7919) % n for i in kept]
    assert [list(row) for row in trace.customdata] == [[i, f"name {i}"] for i in kept]
    assert list(trace.marker.size) == kept
    assert list(trace.error_y.array) == [i / 2 for i in kept]


def test_a_few_marks_on_a_long_line_all_stay():
    line = go.Scatter(x=np.arange(50_000), y=np.arange(50_000.0))
    marks = go.Scatter(x=[3, 1, 2], y=[3.0, 1.0, 2.0], mode="markers")
    thinned, drawn, _ = light(go.Figure([line, marks]), limit=1_000)
    assert list(thinned.data[1].x) == [3, 1, 2]
    assert drawn == 1_000


def test_a_line_keeps_its_course_on_a_logarithmic_axis():
    x = np.geomspace(1, 1e6, 20_000)
    figure = (
        go.Figure(go.Scatter(x=x, y=1 / x, mode="lines")).update_xaxes(type="log").update_yaxes(type="log")
    )
    kept = np.log10(np.array(light(figure, limit=400)[0].data[0].x, dtype=float))
    # A grid of 20 cells a side over six decades: none of the 20 columns is without a point.
    assert np.diff(kept).max() <= 2 * 6 / 20


def test_names_dates_and_gaps_can_be_thinned_too():
    n = 300
    names = go.Scatter(x=[f"layer {i % 30}" for i in range(n)], y=[None if i % 2 else 1.0 for i in range(n)])
    dates = go.Scatter(x=np.arange(n).astype("datetime64[D]"), y=np.full(n, np.nan))
    thinned, drawn, total = light(go.Figure([names, dates]), limit=60)
    assert (drawn, total) == (60, 600)
    assert len(thinned.data[1].x) == 30


def test_a_heatmap_is_kept_whole_in_single_precision():
    z = np.random.default_rng(0).random((300, 300))
    thinned, drawn, total = light(go.Figure(go.Heatmap(z=z)), limit=10)
    assert (drawn, total) == (0, 0)
    assert thinned.data[0].z.dtype == np.float32
    np.testing.assert_array_equal(thinned.data[0].z, z.astype(np.float32))


def test_webgl_scatters_become_plain_ones():
    figure = go.Figure(go.Scattergl(x=[1], y=[2], name="a", marker={"color": "red"}))
    trace = light(figure)[0].data[0]
    assert (trace.type, trace.name, trace.marker.color) == ("scatter", "a", "red")


def test_the_figure_given_is_left_as_it_was():
    figure = go.Figure(go.Scatter(y=np.arange(100.0)), layout={"title": {"text": "kept"}})
    before = figure.to_json()
    thin_traces(figure, limit=10)
    assert figure.to_json() == before


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=20), st.integers(20, 5_000))
def test_room_is_shared_so_that_the_small_keep_all_and_the_large_alike(sizes, limit):
    room = points_per_trace(sizes, limit)
    assert sum(room) == min(limit, sum(sizes))
    assert all(0 < kept <= size for kept, size in zip(room, sizes, strict=True))
    cut = [kept for kept, size in zip(room, sizes, strict=True) if kept < size]
    uncut = [kept for kept, size in zip(room, sizes, strict=True) if kept == size]
    if cut:
        assert max(cut) - min(cut) <= 1  # an indivisible rest
        assert max(uncut, default=0) <= max(cut)
