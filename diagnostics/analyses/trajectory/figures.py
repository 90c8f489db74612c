"""Figures of a run's trajectory, drawn from the tables alone, so that a saved result redraws."""

from functools import partial

import pandas as pd
import plotly.graph_objects as go

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Style, drawn, line
from diagnostics.plotting.set_styles import set_curves, set_lines

SCORES = {"metric": "share of rows or tokens right", "loss": "loss, nats a row or token"}
NONE = pd.DataFrame(columns=["role", "measure", "depth"])
ANGLES = {
    "angle": Style("to the line from first to last", theme.TUNED),
    "turn": Style("to the step before", theme.NEUTRAL, "diamond"),
}
DISTANCES = {
    "distance_start": Style("from the first checkpoint", theme.TUNED),
    "distance_end": Style("to the last checkpoint", theme.BASE, "diamond"),
    "length": Style("length of the step", theme.NEUTRAL, "square"),
}


def draw(result: Result) -> dict[str, go.Figure]:
    """The figures; one without data is left out."""
    scores = {measure: partial(draw_scores, measure=measure) for measure in SCORES}
    return drawn(result, **scores, parting=draw_parting, angles=draw_angles, distances=draw_distances)


def draw_scores(steps: pd.DataFrame, measure: str, troughs: pd.DataFrame = NONE) -> go.Figure | None:
    """Task, keep and train rows over the steps; the deepest trough of keep rows is shaded."""
    if steps[measure].isna().all():
        return None
    title = "The keep rows did not fall" if (steps["role"] == "keep").any() else "The task over the steps"
    figure = theme.figure(title, "step", SCORES[measure])
    set_lines(figure, steps, "step", measure, "step {x}: {y:.4f}")
    keep = troughs.query("role == 'keep' and measure == @measure and depth > 0")
    if not len(keep):
        return figure
    deepest = keep.sort_values("depth").iloc[-1]
    low, back = float(deepest["trough_step"]), bool(deepest["steps_to_recover"] >= 0)
    end = low + float(deepest["steps_to_recover"]) if back else float(steps["step"].max())
    unit = " nats" if measure == "loss" else ""
    text = f"trough: {deepest['depth']:.3g}{unit} deep, {deepest['recovery']:.0%} won back"
    span = (float(steps["step"].min()), end)
    theme.shade(figure, theme.BASE, x=span, annotation_text=text, annotation_position="bottom left")
    ending = "recovered where the shade ends" if back else "have not recovered by the end"
    figure.layout.title.text = f"The keep rows fell and {ending}"
    return theme.threshold(figure, "lowest", x=low)


def draw_parting(steps: pd.DataFrame, result: Result) -> go.Figure | None:
    """Metric of the task against its loss: a line up to the left while both improve."""
    task = steps[steps["role"] == "task"]
    if task[["metric", "loss"]].isna().all().any():
        return None
    correlation = result.metrics.get("decoupling")
    tail = "" if correlation is None else f" (Spearman {correlation:.2f})"
    title = f"Accuracy against loss, step by step: up to the left, both improve{tail}"
    figure = theme.figure(title, SCORES["loss"], SCORES["metric"])
    for style, curve in set_curves(task, "step"):
        ends = ["first", *[""] * (len(curve) - 2), "last"][: len(curve)]
        line(
            figure, curve, "loss", "metric", style, "step {step}: loss {x:.4f}, right {y:.4f}",
            mode="lines+markers+text", text=ends, textposition="top center",
        )  # fmt: skip
    return figure


def draw_angles(path: pd.DataFrame, result: Result) -> go.Figure | None:
    """The angle of each step to the line from first to last, and to the step before it."""
    if path["angle"].isna().all():
        return None
    ratio = result.metrics.get("inefficiency")
    tail = "" if ratio is None else f": the path is {ratio:.2f} times the straight line"
    figure = theme.figure(f"Direction of each step{tail}", "step", "angle, degrees")
    for column, style in ANGLES.items():
        hover = "step {x}: {y:.1f}°, length {length:.4g}"
        line(figure, path[path[column].notna()], "step", column, style, hover)
    figure.update_yaxes(range=[-6, 186], tickvals=[0, 45, 90, 135, 180])
    return theme.threshold(figure, "at right angles", y=90)


def draw_distances(path: pd.DataFrame) -> go.Figure | None:
    """The distance of the weights from the first checkpoint and to the last."""
    if path["angle"].isna().all():
        return None
    figure = theme.figure("How far the weights moved", "step", "Euclidean distance of the weights")
    for column, style in DISTANCES.items():
        line(figure, path[path[column].notna()], "step", column, style, "step {x}: {y:.4g}")
    return figure
