"""Regions as sets: their algebra, how they overlap, and where in a model they lie."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnostics.analyses.skills import region
from probes.files.layout import Header, Matrix
from probes.naming.matrices import matrices

ENTRIES = {"a": 20, "b": 30}


def region_of(sets):
    return {name: torch.tensor(sorted(places)) for name, places in sets.items() if places}


def as_set(indices):
    return {(name, int(entry)) for name, index in indices.items() for entry in index}


REGIONS = st.fixed_dictionaries(
    {name: st.sets(st.integers(0, count - 1)) for name, count in ENTRIES.items()}
).map(region_of)


@given(REGIONS, REGIONS, REGIONS)
@settings(deadline=None)
def test_regions_are_sets(first, second, third):
    a, b = as_set(first), as_set(second)
    assert as_set(region.union([first, second])) == a | b
    assert as_set(region.intersection(first, second)) == a & b
    assert region.size(first) == len(a)
    left = region.union([region.union([first, second]), third])
    assert as_set(left) == as_set(region.union([first, region.union([second, third])]))
    assert as_set(region.union([first, second])) == as_set(region.union([second, first])) >= a


@given(REGIONS, REGIONS)
@settings(deadline=None)
def test_overlap_is_a_share_of_the_second(first, second):
    shared = len(as_set(first) & as_set(second))
    if not as_set(first) or not as_set(second):
        return
    forth, back = region.overlap(first, second), region.overlap(second, first)
    assert 0 <= forth <= 1
    assert forth * region.size(second) == pytest.approx(back * region.size(first)) == pytest.approx(shared)
    assert region.overlap(first, first) == region.jaccard(first, first) == 1
    assert region.jaccard(first, second) == pytest.approx(shared / len(as_set(first) | as_set(second)))


def test_an_empty_region_has_no_overlap_to_speak_of():
    some = region_of({"a": {1}})
    assert np.isnan(region.overlap(some, {}))
    assert np.isnan(region.chance(some, {}, ENTRIES))
    assert np.isnan(region.jaccard({}, {}))
    assert region.overlap({}, some) == region.chance({}, some, ENTRIES) == 0


def test_random_regions_overlap_by_their_density():
    generator = np.random.default_rng(0)
    q, entries = 0.3, {"a": 4000}
    drawn = [{"a": torch.from_numpy(np.sort(generator.choice(4000, 1200, replace=False)))} for _ in range(12)]
    shares = [region.overlap(first, second) for first in drawn for second in drawn if first is not second]
    assert np.mean(shares) == pytest.approx(q, abs=0.01)
    assert region.chance(drawn[0], drawn[1], entries) == pytest.approx(q)


def test_chance_knows_that_both_prefer_the_same_tensor():
    # Of a's 20 entries the first has 10, so that half of the second's 4 there are shared by chance; in b the
    # first has 3 of 30, which gives 2 x 0.1; of the second's 6 that is (2 + 0.2) / 6.
    first = region_of({"a": set(range(10)), "b": {0, 1, 2}})
    second = region_of({"a": {0, 5, 12, 19}, "b": {7, 8}})
    assert region.chance(first, second, ENTRIES) == pytest.approx(2.2 / 6)


def test_purity_is_by_how_much_a_region_serves_its_own_task_best():
    rel = np.array([[0.9, 0.2, -0.5], [0.95, 1.0, np.nan], [0.1, 0.3, 0.8]])
    assert region.purity(rel) == pytest.approx([0.7, 0.05, 0.5])
    assert np.isnan(region.purity(np.array([[1.0]]))).all()


def headers(**shapes):
    return {name: Header(name, shape, torch.float32) for name, shape in shapes.items()}


BLOCK = headers(
    **{
        "h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_attn.bias": (12,), "h.0.attn.c_proj.weight": (4, 4),
        "h.0.mlp.c_fc.weight": (4, 8), "h.0.mlp.c_proj.weight": (8, 4), "h.0.ln_1.weight": (4,),
        "h.0.ln_1.bias": (4,),
    }
)  # fmt: skip


def test_a_region_in_a_fused_transposed_tensor_is_told_apart_into_its_components():
    components = matrices(BLOCK, {"model_type": "gpt2", "n_head": 2})
    # The file keeps (in 4, out 12): columns 0-3 are q, 4-7 k, 8-11 v. Flat place 12 * row + column.
    marks = {
        "h.0.attn.c_attn.weight": torch.tensor([4, 5, 12 + 4, 36 + 11]),
        "h.0.ln_1.bias": torch.tensor([2]),
    }
    shapes = {name: header.shape for name, header in BLOCK.items()}
    rows = {row["component"]: row for row in region.by_component(marks, shapes, components, lambda name: 0)}
    assert {name: row["entries"] for name, row in rows.items()} == {
        "q_proj": 0, "k_proj": 3, "v_proj": 1, "o_proj": 0, "up_proj": 0, "down_proj": 0, "bias": 1,
        "norm": 0,
    }  # fmt: skip
    # 148 entries in all, 16 of them k: (3 / 16) / (5 / 148).
    assert sum(row["size"] for row in rows.values()) == 148
    assert rows["k_proj"]["density"] == pytest.approx(3 / 16 / (5 / 148))
    assert rows["k_proj"]["share"] == 3 / 5
    assert rows["bias"]["size"] == 16  # of both biases
    assert {row["layer"] for row in rows.values()} == {0}
    # An evenly spread region has density 1 everywhere.
    every = {name: torch.arange(header.entries) for name, header in BLOCK.items()}
    even = region.by_component(every, shapes, components, lambda name: 0)
    assert [row["density"] for row in even] == pytest.approx([1] * 8)


def test_the_densest_rows_and_columns_are_named():
    components = matrices(BLOCK, {"model_type": "gpt2", "n_head": 2})
    # k has rows of outputs and columns of inputs: both marks in file row 0 are input 0, outputs 0 and 1.
    marks = {"h.0.attn.c_attn.weight": torch.tensor([4, 5, 12 + 4])}
    shapes = {name: header.shape for name, header in BLOCK.items()}
    rows = region.densest(marks, shapes, components, count=3)
    assert [
        (row["component"], row["axis"], row["place"], row["entries"], row["density"]) for row in rows
    ] == [
        ("k_proj", "column", 0, 2, 0.5),
        ("k_proj", "row", 0, 2, 0.5),
        ("k_proj", "column", 1, 1, 0.25),
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("transformer.h.3.ln_1.weight", "norm"),
        ("transformer.h.3.ln_1.bias", "bias"),
        ("encoder.layer.1.output.LayerNorm.weight", "norm"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("model.layers.0.self_attn.q_proj.bias", "bias"),
        ("model.layers.0.self_attn.sinks", "sinks"),
        ("backbone.layers.0.mixer.A_log", "A_log"),
        ("model.layers.0.mlp.experts.down_proj_bias", "bias"),
    ],
)
def test_what_is_no_matrix_goes_by_its_kind(name, kind):
    assert region.component_of(name) == kind


def test_matrix_is_only_read_through_take():
    matrix = Matrix(name="w", tensor="w", layer=3, component="up_proj", part="block", rows=2, columns=3,
                    dtype=torch.float32)  # fmt: skip
    (row,) = region.by_component({"w": torch.tensor([0, 4])}, {"w": (2, 3)}, {"w": matrix}, lambda name: None)
    assert (row["layer"], row["component"], row["size"], row["entries"]) == (3, "up_proj", 6, 2)
