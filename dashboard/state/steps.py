"""A series as its pages show it: the checkpoints in order, and each measure over them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dashboard.components.drawings import cursor
from dashboard.state.audit_library import AuditLibrary, Entry, read_series
from diagnostics.core.policy import judged, scale
from diagnostics.plotting import theme
from diagnostics.store.files import number
from probes.errors import InputError
from probes.files.untrusted import plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

SIDES = {"against_first": "against the first", "against_previous": "against the previous"}
LOOKS = {
    "against_first": {"color": theme.COLORWAY[0], "dash": "solid", "symbol": theme.SYMBOLS[0]},
    "against_previous": {"color": theme.COLORWAY[2], "dash": "dot", "symbol": theme.SYMBOLS[1]},
}
ROW = 130  # pixels of one measure


@dataclass(frozen=True)
class Step:
    """One checkpoint after the first.

    Attributes:
        entries: the id of its audit, by side; a side that was not audited is not there.
        verdicts, metrics: by side; metrics by `analysis.metric`.
    """

    label: str
    ref: str
    entries: Mapping[str, str] = field(default_factory=dict)
    verdicts: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The severest."""
        return max(self.verdicts.values(), key=("pass", "warn", "fail").index, default="")


def steps(entry: Entry) -> list[Step]:
    """The checkpoints of a series after the first.

    Raises:
        InputError: series.json is damaged.
    """
    record = read_series(entry)
    try:
        return [step(entry, each) for each in record["checkpoints"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = plain(f"damaged: {type(error).__name__} {error}")
        raise InputError(f"series.json of {entry.id}: {said}") from error


def step(entry: Entry, record: Mapping[str, Any]) -> Step:
    """One checkpoint as series.json holds it."""
    sides = {side: record[side] for side in SIDES}
    metrics = {
        side: {
            f"{analysis}.{metric}": number(value)
            for analysis, found in about["metrics"].items()
            for metric, value in found.items()
        }
        for side, about in sides.items()
    }
    verdicts = {side: str(about["verdict"]) for side, about in sides.items()}
    if unknown := set(verdicts.values()) - {"pass", "warn", "fail"}:
        raise InputError(f"verdict {unknown.pop()!r}")
    return Step(
        label=str(record["label"]),
        ref=str(record["ref"]),
        entries={side: f"{entry.id}/{about['audit']}" for side, about in sides.items() if about["audit"]},
        verdicts=verdicts,
        metrics=metrics,
    )


def measures(made: Sequence[Step]) -> list[str]:
    """Every number that some checkpoint has, as `analysis.metric`, in the order of the audits."""
    return list(dict.fromkeys(name for each in made for found in each.metrics.values() for name in found))


def telling(shelf: AuditLibrary, made: Sequence[Step]) -> list[str]:
    """The measures to begin with: the first of each analysis, and those that are judged."""
    known = measures(made)
    firsts = {name.partition(".")[0]: name for name in reversed(known)}.values()
    return [name for name in known if name in firsts or name in limits(shelf, made)][:8]


def limits(shelf: AuditLibrary, made: Sequence[Step]) -> dict[str, dict[str, float]]:
    """The thresholds of each judged measure, by severity, as the last audit that reads has them."""
    for each in reversed(made):
        entry = shelf.find(next(iter(each.entries.values()), ""))
        audit = entry.audit if entry else None
        if audit is not None:
            return {
                f"{name}.{metric}": {
                    severity: value * scale(result, rule)
                    for severity, value in (("warn", rule.warn), ("fail", rule.fail))
                    if value is not None
                }
                for name, result in audit.results.items()
                for metric, rule in judged(result, audit.policy).items()
            }
    return {}


def places(made: Sequence[Step]) -> list[Any]:
    """Where the checkpoints stand on an axis: at their steps, or one after the other by name."""
    try:
        numbers = [float(each.label) for each in made]
    except ValueError:
        return [theme.verbatim(each.label) for each in made]
    return numbers


def span(values: Sequence[float]) -> tuple[float, float]:
    """An axis that holds some values and has room for a word beyond the outermost."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    room = 0.2 * (high - low) or 0.5 * abs(high) or 0.5
    return low - room, high + room


def draw(
    made: Sequence[Step], names: Sequence[str], chosen: int, thresholds: Mapping[str, Mapping[str, float]]
) -> "go.Figure":
    """The measures over the steps, one above the other: a cursor over one is a cursor over all."""
    import plotly.graph_objects as go

    where = places(made)
    figure = go.Figure(layout={"template": theme.template()})
    tall = 124 + ROW * len(names)
    gap = 0.32 / max(1, len(names))
    height = (1 - gap * (len(names) - 1)) / max(1, len(names))
    for i, name in enumerate(names):
        axis = "" if i == 0 else str(i + 1)
        top = 1 - i * (height + gap)
        for side, look in LOOKS.items():
            values = [each.metrics[side].get(name) for each in made]
            if all(value is None for value in values):
                continue
            figure.add_trace(
                go.Scatter(
                    x=where,
                    y=values,
                    yaxis="y" + axis,
                    mode="lines+markers",
                    name=SIDES[side],
                    legendgroup=side,
                    showlegend=i == 0,
                    line={"color": look["color"], "dash": look["dash"]},
                    marker={"symbol": look["symbol"], "size": 8},
                    hovertemplate=f"{theme.verbatim(name)}: %{{y:.4g}}<extra>{SIDES[side]}</extra>",
                )
            )
        limits = thresholds.get(name, {})
        known = [each.metrics[side].get(name) for each in made for side in LOOKS]
        # Where nothing else decides, a threshold's word would be cut off at the edge.
        low, high = span([*limits.values(), *(value for value in known if value is not None)])
        figure.update_layout(
            {
                "yaxis" + axis: {
                    "domain": [max(0.0, top - height), top],
                    "nticks": 4,
                    "anchor": "x",
                    "range": [low, high],
                }
            }
        )
        title = {"text": f"<b>{theme.verbatim(name)}</b>", "font": {"size": 13}}
        figure.add_annotation(
            x=0, y=top, xref="paper", yref="paper", xanchor="left", yanchor="bottom", showarrow=False, **title
        )
        for severity, limit in limits.items():
            figure.add_shape(
                type="line", xref="paper", x0=0, x1=1, yref="y" + axis, y0=limit, y1=limit,
                line={"color": theme.NEUTRAL, "width": 1, "dash": "dash"},
                label={"text": severity, "textposition": "end", "font": {"color": theme.NEUTRAL, "size": 11}},
            )  # fmt: skip
    figure.add_shape(cursor(where[chosen]))
    figure.update_xaxes(
        title="step" if isinstance(where[0], float) else "checkpoint", showspikes=True,
        anchor=f"y{len(names)}" if len(names) > 1 else "y", spikemode="across", spikethickness=1,
        spikecolor=theme.NEUTRAL, spikedash="solid", spikesnap="cursor",
    )  # fmt: skip
    return figure.update_layout(
        height=tall,
        hovermode="x unified",
        hoversubplots="axis",
        margin={"t": 72, "b": 52},
        legend={"y": 1 + 26 / (tall - 124)},
    )
