"""The pictures of intruder dimensions show what the tables say, whatever is missing from them."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.analyses.intruders.figures import decades, draw
from diagnostics.core.analysis import Result
from diagnostics.plotting import theme


def result(tables, **metrics):
    return Result(metrics=metrics, tables=tables, analysis="intruders", parameters={"k": 10, "epsilon": 0.5})


@pytest.fixture
def figures(intruder_tables):
    # Layer 0 frozen, every k_proj not applicable; o_proj of layer l has its l leading vectors as intruders.
    return draw(result(intruder_tables()))


def named(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


def test_every_figure_says_what_is_seen_and_names_its_axes(figures):
    assert list(figures) == ["where", "cosines", "sweep", "spectra", "similarity"]
    for figure in figures.values():
        assert figure.layout.title.text
        assert figure.layout.xaxis.title.text
        assert figure.layout.yaxis.title.text


def test_the_map_counts_each_matrix_and_tells_frozen_from_not_applicable(figures):
    figure = figures["where"]
    # 1 + 2 + 3 intruders in 3 of the 6 measured matrices
    assert figure.layout.title.text == "6 intruders in 3 of 6 matrices; most in layer 3 o_proj"
    counts = named(figure, "intruders")
    assert list(counts.x) == ["0", "1", "2", "3"]
    assert list(counts.y) == ["q_proj", "k_proj", "o_proj"]
    np.testing.assert_array_equal(
        np.array(counts.z, dtype=float), [[np.nan, 0, 0, 0], [np.nan] * 4, [np.nan, 1, 2, 3]]
    )
    assert (counts.zmin, counts.zmax) == (0, 10)
    assert [list(row) for row in named(figure, "= frozen").text] == [["=", "", "", ""]] * 3
    assert [list(row) for row in named(figure, "× not applicable").text] == [
        [""] * 4,
        ["", "×", "×", "×"],
        [""] * 4,
    ]
    assert "<br>3 of 10 directions are intruders<br>lowest cosine from 0.100" in counts.customdata[2][3]
    assert named(figure, "= frozen").customdata[0][0].endswith("<br>frozen")


def test_experts_of_one_layer_share_a_cell_and_what_has_no_layer_stands_beside_the_layers(intruder_tables):
    tables = intruder_tables()
    matrices = tables["matrices"]
    expert = matrices[matrices["component"] == "o_proj"].tail(1)  # layer 3 with 3 intruders
    experts = [expert.assign(matrix=f"{expert['matrix'].iloc[0]}:{i}") for i in range(7)]
    frozen = expert.assign(matrix="a frozen expert", status="frozen", intruders=0)
    head = expert.assign(matrix="lm_head.weight", component="lm_head", layer=np.nan, intruders=1)
    tables["matrices"] = pd.concat([matrices, *experts, frozen, head])
    counts = named(draw(result(tables))["where"], "intruders")
    assert list(counts.x) == ["0", "1", "2", "3", "none"]
    assert list(counts.y) == ["q_proj", "k_proj", "o_proj", "lm_head"]
    assert counts.z[2][3] == 3 * (1 + 7)
    assert counts.zmax == 24
    assert "and 3 more" in counts.customdata[2][3]  # five of eight are named
    assert counts.z[3][4] == 1


def test_a_cosine_is_marked_at_its_certified_end_nearest_epsilon(figures):
    figure = figures["cosines"]
    assert figure.layout.title.text.startswith("6 of 60 leading tuned directions come near no base direction")
    new, near = named(figure, "intruder (direct)"), named(figure, "near the base (subspace)")
    assert set(new.y) == {0.4}  # at most: the upper end of [0.1, 0.4]
    assert set(np.round(new.error_y.arrayminus, 12)) == {0.3}
    assert set(new.error_y.array) == {0.0}
    assert set(near.y) == {0.95}  # at least: the lower end of [0.95, 1]
    assert (new.marker.color, near.marker.color) == (theme.NEW, theme.BASE)
    assert new.marker.symbol != near.marker.symbol
    assert all(abs(x - round(x)) < 0.36 for x in (*new.x, *near.x))
    lines = {shape.y0 for shape in figure.layout.shapes if shape.y0 == shape.y1}
    assert lines == {0.5}
    floor = next(shape for shape in figure.layout.shapes if shape.y0 != shape.y1)
    assert (floor.y0, floor.y1, floor.name) == (0, 0.36, "random floor 0.36")


def test_vectors_beyond_k_and_of_matrices_that_do_not_count_are_not_shown(intruder_tables):
    tables = intruder_tables()
    vectors = tables["vectors"]
    beyond = vectors.assign(rank=vectors["rank"] + 10, intruder=False, cosine_low=0.0, cosine_high=0.2)
    small = vectors.head(10).assign(matrix="model.layers.1.self_attn.k_proj.weight", cosine_high=0.2)
    tables["vectors"] = pd.concat([vectors, beyond, small])
    figure = draw(result(tables))["cosines"]
    assert sum(len(trace.x) for trace in figure.data) == 60


def test_the_sweep_draws_the_audits_k_and_a_band_where_intervals_leave_it_open(figures):
    figure = figures["sweep"]
    lines = {trace.name: trace for trace in figure.data if trace.name}
    assert list(lines) == ["k = 1", "k = 5", "k = 10"]
    assert list(lines["k = 10"].y) == [0, 6, 6]
    assert lines["k = 10"].line.color == theme.NEW
    # A ribbon runs along the upper ends and back along the lower.
    assert [list(trace.y)[:3] for trace in figure.data if not trace.name] == [[6, 6, 6]] * 3
    assert "band" in figure.layout.title.text
    assert figure.layout.shapes[0].x0 == 0.5


def test_an_exact_sweep_has_no_band(intruder_tables):
    tables = intruder_tables()
    tables["sweep"] = tables["sweep"].assign(intruders_high=tables["sweep"]["intruders_low"])
    figure = draw(result(tables))["sweep"]
    assert len(figure.data) == 3
    assert "band" not in figure.layout.title.text


def test_of_matrices_with_equally_many_intruders_none_is_called_the_worst(intruder_tables):
    from diagnostics.analyses.intruders.analysis import summary

    tables = intruder_tables()
    matrices = tables["matrices"]
    tables["matrices"] = matrices.assign(intruders=matrices["intruders"].clip(upper=2))
    measured = result(tables, intruders=5, matrices=6, changed=6, descendant=1)
    # 1, 2 and 2 of the 10 directions of each of the 6 measured matrices
    assert draw(measured)["where"].layout.title.text == "5 intruders in 3 of 6 matrices; at most 2 in one"
    assert summary(measured).startswith(
        "5 of 60 leading directions are new, in 3 of 6 matrices, at most 2 in one ("
    )
    measured = result(intruder_tables(), intruders=6, matrices=6, changed=6, descendant=1)
    assert ", most in model.layers.3.self_attn.o_proj.weight (" in summary(measured)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.7, 30.0, [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]),
        (1e-4, 1.0, [1e-4, 1e-3, 1e-2, 0.1, 1]),
    ],
)
def test_the_logarithmic_axis_names_whole_numbers(low, high, expected):
    assert decades(low, high) == expected


def test_the_worst_matrix_is_shown_with_its_intruders_marked(figures):
    spectra, similarity = figures["spectra"], figures["similarity"]
    assert "3 intruders of model.layers.3.self_attn.o_proj.weight" in spectra.layout.title.text
    assert spectra.layout.yaxis.type == "log"
    # Values from 20 / 20 to 20 / 1.
    assert {"1", "2", "5", "10", "20"} <= set(spectra.layout.yaxis.ticktext)
    assert (named(spectra, "base").line.color, named(spectra, "tuned").line.color) == (
        theme.BASE,
        theme.TUNED,
    )
    marks = named(spectra, "intruder")
    assert list(marks.x) == [1, 2, 3]
    assert list(marks.y) == [20.0, 10.0, pytest.approx(20 / 3)]  # 20 / rank
    assert [note.x for note in similarity.layout.annotations] == [1, 2, 3]
    z = np.array(similarity.data[0].z)
    # Intruders push what the base had three places on: the diagonal starts at tuned rank 4.
    assert list(np.argwhere(z == 0.9)[0]) == [0, 3]
    assert z[:, :3].max() == 0.05


def test_among_equal_counts_the_lowest_cosine_is_the_worst(intruder_tables):
    tables = intruder_tables()
    matrices = tables["matrices"]
    o_proj = matrices["component"] == "o_proj"
    tables["matrices"] = matrices.assign(
        intruders=matrices["intruders"].where(~o_proj, 3),
        min_cosine_low=matrices["min_cosine_low"].mask(o_proj & (matrices["layer"] == 1), 0.01),
    )
    assert "model.layers.1.self_attn.o_proj" in draw(result(tables))["spectra"].layout.title.text


def test_a_pair_without_intruders_is_told_so_and_has_no_worst_matrix(intruder_tables):
    figures = draw(result(intruder_tables(clean=True)))
    assert list(figures) == ["where", "cosines", "sweep"]
    assert figures["where"].layout.title.text == "0 intruders in 0 of 6 matrices"


def test_a_checkpoint_against_itself_shows_frozen_cells_alone(intruder_tables):
    tables = intruder_tables(layers=1)
    tables["sweep"] = tables["sweep"].head(0)
    tables["vectors"] = pd.DataFrame(
        columns=["matrix", "rank", "cosine_low", "cosine_high", "tier", "intruder"]
    )
    figures = draw(result(tables))
    assert list(figures) == ["where"]
    assert [list(row) for row in named(figures["where"], "= frozen").text] == [["="]] * 3


def test_a_tuned_that_is_no_descendant_shows_how_far_it_is_and_no_counts(intruder_tables):
    figures = draw(result(intruder_tables(), descendant=0))
    assert list(figures) == ["cosines"]
    assert figures["cosines"].layout.title.text.startswith("Tuned does not descend from this base")


def test_names_from_a_file_reach_plotly_as_text(intruder_tables, hostile_text):
    for figure in draw(result(intruder_tables(suffix=hostile_text))).values():
        assert "<script>" not in figure.to_json()
        assert "<img" not in figure.to_json()


def test_the_analysis_itself_redraws_after_a_save(tmp_path):
    import torch

    from diagnostics.analyses.intruders.analysis import intruder_dimensions
    from diagnostics.store.files import read_table, write_table
    from probes import CheckpointPair

    generator = torch.Generator().manual_seed(0)
    base = {
        f"model.layers.{layer}.self_attn.{name}.weight": torch.randn(128, 128, generator=generator)
        for layer in range(2)
        for name in ("q_proj", "o_proj")
    }
    tuned = {name: W.clone() for name, W in base.items()}
    u, v = torch.nn.functional.normalize(torch.randn(2, 128, generator=generator), dim=1)
    # 128 x 128 Gaussian: largest singular value near 2 sqrt(128) = 23, so that this spike leads.
    tuned["model.layers.1.self_attn.o_proj.weight"] += 100 * torch.outer(u, v)
    fresh = intruder_dimensions(CheckpointPair(base, tuned))
    tables = {}
    for name, table in fresh.tables.items():
        write_table(tmp_path / f"{name}.parquet", table)
        tables[name] = read_table(tmp_path / f"{name}.parquet")
    again = Result(metrics=fresh.metrics, tables=tables, analysis=fresh.analysis, parameters=fresh.parameters)
    figures = fresh.figures()
    assert list(figures) == ["where", "cosines", "sweep", "spectra", "similarity"]
    assert figures["where"].layout.title.text == "1 intruder in 1 of 1 matrices; most in layer 1 o_proj"
    assert {name: figure.to_json() for name, figure in again.figures().items()} == {
        name: figure.to_json() for name, figure in figures.items()
    }
