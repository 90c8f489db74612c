"""The pictures of skills say what their tables say, for one task and for several, and show names as text."""

import math

import pandas as pd
import pytest

from diagnostics.analyses.skills.figures import draw
from diagnostics.core.analysis import Result

NAME = "<b>x</b>"


def budget(task, *, passes=True):
    rows = [
        {"method": "base", "entries": 0, "rel": 0.0},
        *({"method": "interpolation", "entries": 10_000, "alpha": a, "rel": a} for a in (0.25, 0.5, 0.75)),
        {"method": "tuned", "entries": 10_000, "rel": 1.0},
    ]
    for entries, learned, moved in ((10, 0.4, 0.1), (30, 0.97, 0.2), (100, 1.1, 0.5)):
        kept = learned - 0.01 if passes else learned / 2
        rows += [
            {"method": "movement", "entries": entries, "rel": moved},
            {"method": "random", "entries": entries, "rel": 0.0},
            {"method": "learned", "entries": entries, "rel": learned, "rel_selection": kept,
             "chosen": entries == 30},
        ]  # fmt: skip
    table = pd.DataFrame(rows)
    return table.assign(
        task=task, share=table["entries"] / 10_000, metric=0.5 + table["rel"] / 4,
        rel_low=table["rel"] - 0.1, rel_high=table["rel"] + 0.1, chosen=table["chosen"].eq(True),
    )  # fmt: skip


def places(task):
    return pd.DataFrame(
        [
            {"task": task, "layer": layer, "component": component, "size": 100, "entries": entries,
             "share": entries / 10, "density": 8 * entries / 10}
            for layer, component, entries in (
                (0.0, "q_proj", 7), (0.0, "norm", 3), (1.0, "q_proj", 0), (1.0, "norm", 0),
                (math.nan, "lm_head", 0),
            )
        ]
    )  # fmt: skip


def reliabilities(task):
    return pd.DataFrame(
        [
            {
                "task": task,
                "model": model,
                "bin": bin_,
                "rows": rows,
                "confidence": confidence,
                "accuracy": right,
            }
            for model, bins in {
                "tuned": ((7, 50, 0.5, 0.5), (14, 150, 0.95, 0.75), (10, 1, 0.7, 0.0)),
                "graft": ((9, 200, 0.65, 0.7),),
                "tempered": ((8, 200, 0.6, 0.69),),
            }.items()
            for bin_, rows, confidence, right in bins
        ]
    )


def sets(task):
    return pd.DataFrame(
        [
            {"task": task, "role": role, "set": name, "model": model, "kind": "accuracy", "metric": 0.7,
             "low": 0.6, "high": 0.8, "over_tuned": over, "over_tuned_low": over - 0.05,
             "over_tuned_high": over + 0.05}
            for role, name, over in (("task", task, 0.0), ("ood", NAME, 0.1), ("keep", "kept", -0.1))
            for model in ("base", "tuned", "graft", "complement", "interpolation 0.5")
        ]
    )  # fmt: skip


def crossed(names):
    pairs = [(a, b) for a in names for b in names]
    values = [1.0 if a == b else 0.2 for a, b in pairs]
    overlap = pd.DataFrame(
        [
            {"task": a, "other": b, "overlap": v, "chance": 0.01, "jaccard": v}
            for (a, b), v in zip(pairs, values, strict=True)
        ]
    )
    rel = pd.DataFrame(
        [
            {"region": a, "task": b, "rel": v, "low": v, "high": v}
            for (a, b), v in zip(pairs, values, strict=True)
        ]
    )
    unions = pd.DataFrame(
        [
            {"union": " + ".join(group), "task": name, "member": name in group, "rel": 0.9 if name in group
             else 0.1, "low": 0.0, "high": 1.0, "entries": 60}
            for group in (tuple(names), tuple(names[:1]))
            for name in names
        ]
    )  # fmt: skip
    return {"overlap": overlap, "rel": rel, "unions": unions}


def result(tables):
    return Result(metrics={}, tables=tables, analysis="skills", parameters={"kept": 0.95})


def tables(*names):
    makers = {"budget": budget, "region": places, "reliability": reliabilities, "sets": sets}
    frames = {key: pd.concat([make(name) for name in names]) for key, make in makers.items()}
    return frames | (crossed(list(names)) if len(names) > 1 else {})


def title(figure):
    return figure.layout.title.text


def test_titles_say_what_is_seen_and_names_are_text():
    figures = draw(result(tables(NAME)))
    assert list(figures) == ["curve", "region", "reliability", "sets"]
    text = "&lt;b&gt;x&lt;/b&gt;"
    assert title(figures["curve"]) == (
        f"{text}: 30 entries keep 97% of what tuning gained; as many that moved furthest, 20%"
    )
    assert (
        title(figures["region"])
        == f"{text}: this region is densest in layer 0 q_proj, 5.6 times an even spread"
    )
    # 150 of 201 rows are off by 0.2, and one by 0.7.
    assert title(figures["reliability"]) == (
        f"{text}: calibration error 0.15 of tuned, 0.05 of the graft, 0.09 of tuned with one temperature"
    )
    assert title(figures["sets"]) == (
        f"{text}: the graft is surely better than tuned on {text} and surely worse on kept"
    )
    assert not any("<b>x" in figure.to_json() for figure in figures.values())


def test_the_skill_size_stands_where_the_region_is_that_keeps_enough():
    figure = draw(result({"budget": budget("t")}))["curve"]
    notes = {note.text: note for note in figure.layout.annotations}
    # On a logarithmic axis a note stands at the logarithm.
    assert notes["skill size: 0.003"].x == pytest.approx(math.log10(0.003))
    assert "0.95 of the gain" in notes
    lines = {shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1}
    assert lines == {0.003}
    names = {trace.name: trace for trace in figure.data}
    learned = names["learned"]
    assert list(learned.y) == [0.4, 0.97, 1.1]
    assert list(learned.x) == [0.001, 0.003, 0.01]
    assert list(names["base + α of the whole update (control)"].text) == ["α 0.25", "α 0.5", "α 0.75"]
    low, high = figure.layout.xaxis.range
    assert low < math.log10(0.001) < math.log10(0.01) < high


def test_a_skill_that_no_size_carries_is_said_to_be_none():
    figure = draw(result({"budget": budget("t", passes=False)}))["curve"]
    assert title(figure) == "t: no region tried keeps 0.95 of what tuning gained"
    assert any(note.text.startswith("reported: ") for note in figure.layout.annotations)


def test_bins_of_a_few_rows_are_not_drawn():
    figure = draw(result({"reliability": reliabilities("t")}))["reliability"]
    tuned = next(trace for trace in figure.data if trace.name.startswith("tuned, error"))
    assert list(tuned.x) == [0.5, 0.95]


def test_several_tasks_have_a_menu_that_shows_one_at_a_time():
    figures = draw(result(tables("one", "two", "three")))
    assert list(figures)[-3:] == ["overlap", "rel", "unions"]
    figure = figures["curve"]
    buttons = figure.layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == ["one", "two", "three"]
    shown = [button.args[0]["visible"] for button in buttons]
    assert [sum(visible) for visible in shown] == [len(figure.data) / 3] * 3
    assert all(sum(column) == 1 for column in zip(*shown, strict=True))
    assert [trace.visible for trace in figure.data] == shown[0]
    assert buttons[1].args[1]["title.text"].startswith("two: 30 entries keep")


def test_tasks_side_by_side_are_summed_up():
    figures = draw(result(tables("one", "two")))
    assert title(figures["overlap"]) == (
        "Regions overlap by at most 0.20: one holds that much of two, 20 times chance"
    )
    assert title(figures["rel"]) == (
        "Regions keep 1.00 or more of their own task's gain, and 0.20 to 0.20 of another's"
    )
    assert title(figures["unions"]) == "Regions together keep 0.90 to 0.90 of what their tasks gained"
    pale = figures["unions"].data[1].marker.color
    assert pale[0] != pale[1]  # the second task is left out of the second union


def test_what_is_not_there_is_not_drawn():
    assert draw(result({})) == {}
    ends = budget("t")
    ends = ends[ends["method"].isin(["base", "tuned"])]
    assert draw(result({"budget": ends})) == {}


def test_a_dense_cell_and_an_empty_one_can_be_told_apart():
    figure = draw(result({"region": places("t")}))["region"]
    (heat,) = figure.data
    assert list(heat.x) == ["0", "1", "none"]
    assert list(heat.y) == ["q_proj", "lm_head", "norm"]
    cells = {(y, x): text for y, row in zip(heat.y, heat.text, strict=True)
             for x, text in zip(heat.x, row, strict=True)}  # fmt: skip
    assert cells["q_proj", "0"] == "5.6"
    assert cells["q_proj", "1"] == "·"
    assert cells["lm_head", "0"] == ""
    assert 0 in [round(math.log2(float(t))) for t in heat.colorbar.ticktext if "/" not in t]
