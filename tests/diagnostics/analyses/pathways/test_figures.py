"""The pictures of pathways show what the tables hold, and leave out what there is not."""

import json

import numpy as np
import pytest

from diagnostics.analyses.pathways.figures import draw
from diagnostics.analyses.pathways.sample_figures import APART, borders, hues
from diagnostics.analyses.pathways.tables import tables
from diagnostics.core.analysis import Result
from tests.diagnostics.routed import records_of, run_of, samples_of

# Two steps, at which nothing and all is shared.
ENDS = (0.0, 1.0)


@pytest.fixture(scope="module")
def frames():
    return tables(run_of())


def drawn(frames):
    return draw(Result(metrics={}, tables=frames))


def test_every_picture_is_there_with_a_title_and_survives_json(frames):
    figures = drawn(frames)
    assert set(figures) == {
        "steps", "against_held_out", "layers", "groups", "smoothness", "matrix", "routes", "drift",
    }  # fmt: skip
    for figure in figures.values():
        assert figure.layout.title.text
        assert json.loads(figure.to_json())
    assert figures["steps"].layout.title.text.startswith("Reorganising after memorisation")


def test_the_curves_are_those_of_the_table_with_memorisation_and_turn_marked(frames):
    figure = drawn(frames)["steps"]
    lines = {trace.name: trace for trace in figure.data if trace.name}
    steps, verdict = frames["steps"], frames["verdict"].iloc[0]
    for name, column in (("distance within groups", "distance"), ("between groups", "between"),
                         ("smoothness", "consistency"), ("held-out accuracy", "held_out")):  # fmt: skip
        assert np.array_equal(lines[name].y, steps[column])
        assert np.array_equal(lines[name].x, steps["step"])
    marks = [(shape.x0, shape.x1) for shape in figure.layout.shapes]
    assert marks.count((verdict["memorised"], verdict["memorised"])) == 4  # a line in each panel
    assert marks.count((verdict["turn_low"], verdict["turn_high"])) == 4


def test_what_is_not_dated_is_not_marked():
    figure = drawn(tables(run_of(samples_of(trained=False))))["steps"]
    assert not figure.layout.shapes


def test_one_group_has_no_gap_to_draw():
    samples = samples_of(groups=1)
    figures = drawn(tables(run_of(samples, steps=ENDS, records=records_of(samples, shared=ENDS))))
    assert "groups" not in figures
    assert [trace.name for trace in figures["layers"].data] == ["distance"]
    assert "between groups" not in [trace.name for trace in figures["steps"].data]


def test_the_map_of_layers_has_the_table_in_its_cells(frames):
    figure = drawn(frames)["layers"]
    layers = frames["layers"]
    cell = layers[(layers["layer"] == 3) & (layers["step"] == 800)].iloc[0]
    for trace, column in zip(figure.data, ("distance", "gap"), strict=True):
        row, col = list(trace.y).index("3"), list(trace.x).index("800")
        assert np.asarray(trace.z, dtype=float)[row][col] == cell[column]


def test_the_matrix_is_whole_and_in_the_order_of_groups_at_three_steps(frames):
    figure = drawn(frames)["matrix"]
    assert [note.text for note in figure.layout.annotations] == ["step 0", "step 100", "step 1200"]
    last = np.asarray(figure.data[-1].z, dtype=float)
    assert last.shape == (80, 80)
    assert (last == last.T).all()
    blocks = last.reshape(4, 20, 4, 20).mean(axis=(1, 3))
    assert np.diag(blocks).max() == 0
    assert blocks[~np.eye(4, dtype=bool)].min() > 0.5
    assert list(figure.layout.yaxis.ticktext) == ["g0", "g1", "g2", "g3"]


def test_the_routes_show_the_leading_expert_of_each_sample_and_layer(frames):
    figure = drawn(frames)["routes"]
    run = run_of()
    shown = np.asarray(figure.data[-1].z)
    assert (shown == run.snapshots[-1].weights.argmax(axis=2)).all()
    assert list(figure.data[-1].x) == ["1", "2", "3", "5"]


def test_the_histogram_counts_every_sample_by_group_or_together(frames):
    figure = drawn(frames)["drift"]
    assert [trace.name for trace in figure.data] == ["g0", "g1", "g2", "g3"]
    assert sum(len(trace.x) for trace in figure.data) == 80
    samples = samples_of(groups=APART + 1, group_size=4)
    many = drawn(tables(run_of(samples, steps=ENDS, records=records_of(samples, shared=ENDS))))["drift"]
    assert [len(trace.x) for trace in many.data] == [24]


def test_many_samples_are_shown_as_a_few_of_each_group():
    samples = samples_of(groups=3, group_size=60)
    frames = tables(run_of(samples, steps=ENDS, records=records_of(samples, shared=ENDS)))
    shown = frames["routes"]["sample"].unique()
    assert len(shown) == 96
    assert np.bincount(samples.groups[shown]).tolist() == [32, 32, 32]
    assert (np.diff(shown) > 0).all()


def test_markup_in_the_names_of_groups_is_shown_as_text(hostile_text):
    from dataclasses import replace

    samples = replace(samples_of(groups=2), names=(hostile_text, "b"))
    figures = drawn(tables(run_of(samples, steps=ENDS, records=records_of(samples, shared=ENDS))))
    for name in ("groups", "matrix", "routes", "drift"):
        assert "<script" not in figures[name].to_json(), name
        assert "&lt;script" in figures[name].to_json(), name


def test_borders_stand_between_groups_and_names_in_their_middle():
    assert borders(["a", "a", "b", "b", "b"]) == ([1.5], [0.5, 3.0], ["a", "b"])


def test_experts_have_colours_of_their_own():
    assert len(set(hues(64))) == 64
