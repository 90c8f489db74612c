"""The pictures say what the tables hold, each with its regime, and leave out what there is not."""

import math

import numpy as np
import pandas as pd
import pytest

from diagnostics.analyses.sparsity.figures import draw
from diagnostics.core.analysis import Result

GRID = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])


def rows_of_curve(model, edge, *, regime="zero_shot", role="task", metric="accuracy"):
    """A curve that falls behind its edge, and at once at random."""
    rows = []
    for pattern, steep, at in (("magnitude", 1.0, edge), ("random", 1.5, 0.0)):
        drop = steep * np.maximum(GRID - at, 0)
        for s, fall in zip(GRID, drop, strict=True):
            value = 0.8 - fall if metric == "accuracy" else 2.0 + fall
            rows.append(
                {
                    "model": model, "pattern": pattern, "sparsity": s, "role": role, "metric": metric,
                    "value": value, "low": value - 0.02, "high": value + 0.02, "regime": regime,
                    "realised": s, "drop": fall, "drop_low": fall - 0.01 * (s > 0),
                    "drop_high": fall + 0.01 * (s > 0),
                }
            )  # fmt: skip
    return rows


def point_of(model, edge, *, regime="zero_shot", role="task", metric="accuracy", decided=True, reached=True):
    value = 0.8 if metric == "accuracy" else 2.0
    estimates = (edge, edge + 0.1, edge + 0.01, edge, edge + 0.02) if decided else (math.nan,) * 5
    names = ("dropping_point", "until", "robust_point", "low", "high")
    return {
        "role": role, "model": model, "regime": regime, "metric": metric, "value": value,
        "allowed": 0.01 * (value if metric == "loss" else 1), "reached": reached, "decided": decided,
        "verdict": "sharp" if decided else "unclear", **dict(zip(names, estimates, strict=True)),
    }  # fmt: skip


@pytest.fixture
def tables(hostile_text):
    layers = [
        {
            "model": model, "matrix": f"{hostile_text}.{layer}.{component}", "layer": layer,
            "component": component, "at": 0.5, "entries": 100, "sparsity": share, "density": 1 - share,
            "gaussian": share - 0.1, "excess": 0.1, "rms": 0.05, "zero": 0.0,
        }
        for model in ("base", "tuned")
        for layer, component, share in (
            (0, "down_proj", 0.6), (0, "q_proj", 0.4), (1, "down_proj", 0.9), (10, "q_proj", 0.2),
        )
    ]  # fmt: skip
    patterns = [
        {
            "model": model, "pattern": pattern, "sparsity": 0.5, "role": "task", "metric": "accuracy",
            "value": 0.8 - drop, "drop": drop, "drop_low": drop - 0.01, "drop_high": drop + 0.01,
            "perplexity_ratio": math.nan, "kept_l1": 0.7, "kept_l2": 0.8, "regime": "zero_shot",
        }
        for model in ("base", "tuned")
        for pattern, drop in (("magnitude", 0.1), ("random", 0.7), ("1:2", 0.3), ("2:4", 0.2), ("4:8", 0.15))
    ]  # fmt: skip
    overlap = {
        "sparsity": GRID[1:], "cosine": 0.95, "cosine_chance": 1 - GRID[1:], "kappa": 0.8, "iou": 0.9,
        "iou_chance": GRID[1:] / (2 - GRID[1:]), "revived": 0.1, "revived_chance": 1 - GRID[1:],
        "delta_low": GRID[1:] ** 2, "delta_low_chance": GRID[1:],
    }  # fmt: skip
    return {
        "points": pd.DataFrame([point_of("base", 0.4), point_of("tuned", 0.2)]),
        "curve": pd.DataFrame([*rows_of_curve("base", 0.4), *rows_of_curve("tuned", 0.2)]),
        "patterns": pd.DataFrame(patterns),
        "layers": pd.DataFrame(layers).astype({"layer": "Int64"}),
        "overlap": pd.DataFrame(overlap),
    }


def drawn(tables):
    return draw(Result(metrics={}, tables=tables))


def trace(figure, name):
    return next(candidate for candidate in figure.data if candidate.name == name)


def test_every_table_has_its_pictures_and_a_missing_one_none(tables):
    pictures = ["task_close", "task_curve", "patterns", "layers", "overlap", "change"]
    assert list(drawn(tables)) == pictures
    gone = {"curve": pictures[:2], "patterns": ["patterns"], "layers": ["layers"], "overlap": pictures[-2:]}
    for name, missing in gone.items():
        assert list(drawn({**tables, name: tables[name].head(0)})) == [
            w for w in pictures if w not in missing
        ]


def test_a_curve_is_drawn_with_its_control_its_ribbon_and_its_regime(tables):
    figure = drawn(tables)["task_curve"]
    assert [line.name for line in figure.data if line.name] == [
        "base, zero-shot", "base, zero-shot, random", "tuned, zero-shot", "tuned, zero-shot, random",
    ]  # fmt: skip
    shown = trace(figure, "tuned, zero-shot")
    expected = tables["curve"].query("model == 'tuned' and pattern == 'magnitude'")
    np.testing.assert_allclose(shown.y, expected["value"])
    ribbon = figure.data[list(figure.data).index(shown) - 1]
    np.testing.assert_allclose(ribbon.y, [*expected["high"], *expected["low"][::-1]])
    assert figure.layout.yaxis.title.text == "accuracy"


def test_the_close_look_marks_the_bracket_the_point_and_the_tolerance(tables):
    figure = drawn(tables)["task_close"]
    assert figure.layout.title.text == (
        "On the task rows tuned tolerates a sparsity of 0.2, base tolerates a sparsity of 0.4"
    )
    brackets = sorted((shape.x0, shape.x1) for shape in figure.layout.shapes if shape.yref == "y domain")
    assert brackets == [pytest.approx((0.2, 0.3)), pytest.approx((0.4, 0.5))]
    marks = [mark for mark in figure.data if mark.error_x.array is not None]
    # The robust point lies on the line of the tolerance, 0.01 behind the edge and surely within 0.02.
    assert [(*mark.x, *mark.y) for mark in marks] == [pytest.approx((x, 0.01)) for x in (0.41, 0.21)]
    assert [mark.error_x.array[0] for mark in marks] == pytest.approx([0.01, 0.01])
    assert figure.layout.annotations[0].text == "tolerance 0.01"
    low, high = figure.layout.yaxis.range
    assert low < 0 < 0.01 < high < 0.2  # random pruning is not to press it flat


def test_losses_are_shown_as_shares_of_the_loss_without_a_mask(tables):
    tables["points"] = pd.DataFrame(
        [point_of("base", 0.4, metric="loss"), point_of("tuned", 0.2, metric="loss")]
    )
    tables["curve"] = pd.DataFrame(
        [*rows_of_curve("base", 0.4, metric="loss"), *rows_of_curve("tuned", 0.2, metric="loss")]
    )
    figures = drawn(tables)
    shown = trace(figures["task_close"], "base, zero-shot")
    assert shown.y[-1] == pytest.approx(0.5 / 2.0)  # 0.5 nats of 2
    assert figures["task_close"].layout.annotations[0].text == "tolerance 0.01"
    assert figures["task_curve"].layout.yaxis.title.text == "loss, nats"


def test_what_rows_cannot_tell_has_no_bracket_and_shows_its_noise(tables):
    tables["points"] = pd.DataFrame([point_of(model, 0.4, decided=False) for model in ("base", "tuned")])
    noisy = tables["curve"]
    noisy.loc[noisy["sparsity"] > 0, "drop_high"] += 0.3
    figure = drawn(tables)["task_close"]
    assert figure.layout.title.text == "The task rows are too few to tell the tolerance from noise"
    assert not [shape for shape in figure.layout.shapes if shape.yref == "y domain"]
    assert figure.layout.yaxis.range[1] > 0.3
    tables["points"] = pd.DataFrame(
        [point_of("base", 0.4, decided=False), point_of("tuned", 0.9, reached=False)]
    )
    assert drawn(tables)["task_close"].layout.title.text == (
        "On the task rows tuned tolerates a sparsity of 0.9 and more, base cannot be told from noise"
    )


def test_masked_fine_tuning_has_a_line_of_its_own(tables):
    more = {"regime": "masked_finetune"}
    tables["points"] = pd.concat([tables["points"], pd.DataFrame([point_of("base", 0.6, **more)])])
    tables["curve"] = pd.concat([tables["curve"], pd.DataFrame(rows_of_curve("base", 0.6, **more))])
    figures = drawn(tables)
    for name in ("task_close", "task_curve"):
        shown = trace(figures[name], "base, masked fine-tuning")
        assert shown.line.color != trace(figures[name], "base, zero-shot").line.color
    # The title is of what is not tuned again.
    assert figures["task_close"].layout.title.text.endswith("base tolerates a sparsity of 0.4")


def test_bars_go_from_the_freest_pattern_to_the_strictest(tables):
    figure = drawn(tables)["patterns"]
    for bar in figure.data:
        assert list(bar.x) == ["free", "4:8", "2:4", "1:2"]
        np.testing.assert_allclose(bar.y, [0.1, 0.15, 0.2, 0.3])
    assert {bar.marker.pattern.shape for bar in figure.data} == {None, "/"}  # never colour alone


def test_tasks_and_keep_rows_have_bars_side_by_side(tables):
    keep = tables["patterns"].assign(role="keep", metric="loss")
    figure = drawn({**tables, "patterns": pd.concat([tables["patterns"], keep])})["patterns"]
    assert [axis.title.text for axis in (figure.layout.yaxis, figure.layout.yaxis2)] == [
        "accuracy lost", "loss added, nats",
    ]  # fmt: skip
    assert [bar.showlegend for bar in figure.data] == [True, True, False, False]


def test_the_map_of_layers_is_in_the_order_of_the_model_and_can_be_turned(tables, hostile_text):
    figure = drawn(tables)["layers"]
    first = figure.data[0]
    assert list(first.x) == ["0", "1", "10"]
    assert list(first.y) == ["q_proj", "down_proj"]
    assert [line.visible for line in figure.data] == [True, False, False, False]
    buttons = figure.layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == [
        "tuned at 0.5: sparsity", "tuned at 0.5: beyond scale", "base at 0.5: sparsity",
        "base at 0.5: beyond scale",
    ]  # fmt: skip
    for index, button in enumerate(buttons):
        assert (
            list(button.args[0]["visible"] if isinstance(button.args[0], dict) else button.args[1]).index(
                True
            )
            == index
        )
    assert figure.layout.title.text == (
        "At 0.5 overall, layer 1 down_proj of tuned is 0.90 sparse, the most of any matrix"
    )
    assert hostile_text not in str(first.customdata)
    assert "&lt;script&gt;" in str(first.customdata)


def test_experts_share_a_cell_by_their_entries(tables):
    layers = tables["layers"].query("model == 'tuned'").head(1)
    two = pd.concat([layers.assign(entries=100, sparsity=0.2), layers.assign(entries=300, sparsity=0.6)])
    figure = drawn({**tables, "layers": pd.concat([two, two.assign(model="base")])})["layers"]
    assert figure.data[0].z[0][0] == pytest.approx(0.5)  # (0.2 x 100 + 0.6 x 300) / 400


def test_chance_stands_beside_every_likeness(tables):
    figure = drawn(tables)["overlap"]
    np.testing.assert_allclose(trace(figure, "kappa by chance").y, 0)
    np.testing.assert_allclose(trace(figure, "cosine of what is kept by chance").y, 1 - GRID[1:])
    assert "kappa is 0.80 or more" in figure.layout.title.text
    change = drawn(tables)["change"]
    assert "smallest 0.3 of the weights hold 0.09 of the squared change" in change.layout.title.text
    assert list(change.data[0].x) == list(change.data[0].y)


def test_without_a_change_there_is_no_picture_of_it(tables):
    tables["overlap"]["delta_low"] = math.nan
    assert "change" not in drawn(tables)
