"""The same figure of several audits as panels of one figure, on shared axes.

plotly.js keeps shared axes in step, so that zooming into one panel zooms into all. Axes that measure
different things stay separate.
"""

import base64
import copy
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diagnostics.plotting import theme

Spec = Mapping[str, Any]  # what plotly.js draws: `data` and `layout`
Domain = Mapping[str, tuple[float, float]]  # the x and y ends of a panel, as shares of the plotting area

HEAD, FOOT, GAP = 76, 56, 104  # pixels: above all panels, below them, and between two rows of them
TITLE = 34  # letters of an axis title that fit below a narrow panel
LINE = 18  # pixels: one more line of a title
PAGE, LETTER = 1060, 7  # pixels: a figure on a wide page, and a letter of a label
AXIS = re.compile(r"([xy])axis(\d*)")
# The properties of an axis that name another axis.
REFERENCES = ("anchor", "overlaying", "matches", "scaleanchor")
COLORS = (
    "zmin", "zmax", "zmid", "zauto", "colorscale", "autocolorscale", "reversescale", "colorbar", "showscale",
)  # fmt: skip
CARTESIAN = {"scatter", "scattergl", "bar", "heatmap", "histogram", "box", "violin"}


def figure_panels(
    specs: Mapping[str, Spec], heights: Mapping[str, int], columns: int
) -> dict[str, Any] | None:
    """Several figures as panels of one; None where they cannot be joined.

    Args:
        specs: the figures by audit, in order.
        heights: the height of each figure alone, in pixels.
        columns: panels in a row.
    """
    figures = list(specs.values())
    menus = joint_menus(figures)
    if menus is None or not all(map(is_cartesian, figures)):
        return None
    shared = shared_axes(figures)
    columns = max(1, min(columns, len(figures)))
    rows = -(-len(figures) // columns)
    more = LINE * (max(map(title_lines, figures)) - 1) if columns > 1 else 0
    gap, foot = GAP + more, FOOT + more
    inner = max(160, max(heights.values()) - HEAD - FOOT)
    drawn = rows * inner + (rows - 1) * gap
    domains = grid(len(figures), columns, inner / drawn, column_gap(figures, shared), gap / drawn)
    per_panel = ("shapes", "annotations", "updatemenus", "height", "legend")
    layout: dict[str, Any] = {
        key: copy.deepcopy(value)
        for key, value in figures[0]["layout"].items()
        if not AXIS.fullmatch(key) and key not in per_panel
    }
    layout |= {"shapes": [], "annotations": []}
    data: list[dict[str, Any]] = []
    for i, (name, spec, domain) in enumerate(zip(specs, figures, domains, strict=True)):
        panel = Panel(spec, i, domain, shared, first=i % columns == 0, narrow=columns > 1)
        data += panel.traces()
        layout |= panel.axes()
        layout["shapes"] += panel.marks("shapes")
        layout["annotations"] += [*panel.marks("annotations"), panel_title(name, domain, spec)]
    share_colors(data, layout)
    share_legend(data, all(len(spec["data"]) == 1 for spec in figures))
    share_legend([shape for shape in layout["shapes"] if shape.get("showlegend")], alone=False)
    above = {"y": 1 + 30 / drawn, "yanchor": "bottom"}
    layout["height"] = drawn + HEAD + foot
    layout["margin"] = {"t": HEAD, "b": foot}
    layout["legend"] = {"orientation": "h", "x": 0, **above}
    if menus:
        layout["updatemenus"] = [{**menus, "x": 1, "xanchor": "right", **above}]
    return {"data": data, "layout": layout}


def is_cartesian(spec: Spec) -> bool:
    """Whether a figure has only x and y axes and no slider."""
    kinds = {trace.get("type", "scatter") for trace in spec["data"]}
    return bool(spec["data"]) and kinds <= CARTESIAN and not spec["layout"].get("sliders")


def grid(count: int, columns: int, height: float, gap: float, between: float) -> list[Domain]:
    """The areas of the panels, row by row from the top."""
    width = (1 - gap * (columns - 1)) / columns
    domains: list[Domain] = []
    for i in range(count):
        left, top = (i % columns) * (width + gap), 1 - (i // columns) * (height + between)
        domains.append({"x": (left, min(1.0, left + width)), "y": (max(0.0, top - height), top)})
    return domains


def within(ends: tuple[float, float], share: float) -> float:
    """The place on the plotting area at a share of a panel."""
    return ends[0] + share * (ends[1] - ends[0])


def column_gap(specs: Sequence[Spec], shared: Mapping[str, Any]) -> float:
    """The gap between columns as a share of a page; only the first panel labels a shared y axis."""
    axes = [item for spec in specs for item in axes_of(spec).items()]
    separate = [axis for key, axis in axes if key[0] == "y" and key not in shared]
    if not separate:
        return 0.03
    longest = max(len(str(label)) for axis in separate for label in (axis.get("ticktext") or ["00000"]))
    return min(0.3, (longest * LETTER + 40) / PAGE)


def axis_key(axis: str) -> str:
    """The key in a layout of an axis such as `x2`."""
    return f"{axis[0]}axis{axis[1:]}"


def axes_of(spec: Spec) -> dict[str, dict[str, Any]]:
    """The axes of a figure by their keys, the implicit ones included."""
    named = {key: value for key, value in spec["layout"].items() if AXIS.fullmatch(key)}
    used = {axis_key(trace.get(f"{letter}axis", letter)) for trace in spec["data"] for letter in "xy"}
    return {key: dict(named.get(key) or {}) for key in sorted({*named, *used})}


def shared_axes(specs: Sequence[Spec]) -> dict[str, list[float] | None]:
    """The axes that measure the same thing in every figure, by key, with the range that contains all figures.

    Without a range, plotly.js finds it.
    """
    every = [axes_of(spec) for spec in specs]
    shared = {}
    for key in set(every[0]).intersection(*every[1:]):
        axes = [axes[key] for axes in every]
        if len(set(map(measured, axes))) == 1:
            ends = united(axis.get("range") for axis in axes)
            # plotly.js makes the joint range of logarithmic axes far too wide.
            shared[key] = log_range(specs, key) if ends is None and axes[0].get("type") == "log" else ends
    return shared


def measured(axis: Mapping[str, Any]) -> str:
    """What an axis measures, and how: equal for axes that can be shared."""
    title = axis.get("title") or {}
    text = title.get("text") if isinstance(title, Mapping) else title
    parts = (axis.get(key) for key in ("type", "tickformat", "tickvals", "ticktext", "categoryarray"))
    ends: Any = axis.get("range")
    backwards = axis.get("autorange") == "reversed" or (is_numeric_range(ends) and ends[0] > ends[1])
    return repr([text, *parts, backwards])


def wrapped(title: Any) -> Any:
    """An axis title in lines that fit below a narrow panel."""
    if not isinstance(title, Mapping) or not title.get("text") or "<" in title["text"]:
        return title
    return {**title, "text": "<br>".join(textwrap.wrap(title["text"], TITLE))}


def title_lines(spec: Spec) -> int:
    """The number of lines of the longest x axis title of a figure."""
    titles = [wrapped(axis.get("title")) for key, axis in axes_of(spec).items() if key[0] == "x"]
    texts = [title.get("text") or "" for title in titles if isinstance(title, Mapping)]
    return 1 + max((text.count("<br>") for text in texts), default=0)


def log_range(specs: Sequence[Spec], key: str) -> list[float] | None:
    """The range, in powers of ten, of everything drawn on a logarithmic axis; None if nothing is."""
    letter = key[0]
    traces = [trace for spec in specs for trace in spec["data"]]
    drawn = [trace for trace in traces if axis_key(trace.get(f"{letter}axis", letter)) == key]
    values = np.concatenate([np.empty(0), *(trace_numbers(trace.get(letter)) for trace in drawn)])
    powers = np.log10(values[np.isfinite(values) & (values > 0)])
    if not powers.size:
        return None
    margin = 0.05 * float(np.ptp(powers)) or 0.1
    return [float(powers.min()) - margin, float(powers.max()) + margin]


def trace_numbers(values: Any) -> np.ndarray:
    """The numbers of a trace, in either form that plotly.js reads; empty for dates and text."""
    if isinstance(values, Mapping):
        return np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"]).astype(float)
    try:
        return np.array(values if values is not None else [], dtype=float).ravel()
    except (TypeError, ValueError):
        return np.empty(0)


def is_numeric_range(ends: Any) -> bool:
    """Whether both ends of a range are numbers."""
    return isinstance(ends, list | tuple) and [isinstance(end, int | float) for end in ends] == [True, True]


def united(ranges: Iterable[Any]) -> list[float] | None:
    """The range that contains all of several; None unless all are numeric."""
    every = list(ranges)
    if not all(map(is_numeric_range, every)):
        return None
    low, high = min(min(ends) for ends in every), max(max(ends) for ends in every)
    return [high, low] if every[0][0] > every[0][1] else [low, high]


@dataclass(frozen=True)
class Panel:
    """One figure as the i-th panel of several.

    Attributes:
        shared: see `shared_axes`.
        first: whether it is the first of its row.
        narrow: whether it shares its row, so that long titles wrap.
    """

    spec: Spec
    i: int
    domain: Domain
    shared: Mapping[str, list[float] | None]
    first: bool
    narrow: bool

    def renamed(self, axis: str) -> str:
        """The name of an axis such as `x2` in the joint figure: each panel has ten numbers of its own."""
        number = int(axis[1:] or 1) + 10 * self.i
        return axis[0] + (str(number) if number > 1 else "")

    def reference(self, axis: Any) -> Any:
        """A reference to an axis under its new name; `free`, `paper` and the like stay."""
        if not isinstance(axis, str):
            return axis
        return re.sub(r"^([xy]\d*)(?= domain$|$)", lambda name: self.renamed(name[0]), axis)

    def traces(self) -> list[dict[str, Any]]:
        """Its traces on their new axes."""
        return [
            {**trace, **{f"{c}axis": self.renamed(trace.get(f"{c}axis", c)) for c in "xy"}}
            for trace in self.spec["data"]
        ]

    def axes(self) -> dict[str, dict[str, Any]]:
        """Its axes, each inside the panel."""
        axes = {}
        for key, axis in axes_of(self.spec).items():
            letter, name = key[0], key[0] + key[5:]
            moved = axis | {part: self.reference(axis[part]) for part in REFERENCES if part in axis}
            moved["domain"] = [within(self.domain[letter], end) for end in axis.get("domain", (0, 1))]
            moved.setdefault("anchor", self.renamed(("y" if letter == "x" else "x") + key[5:]))
            if letter == "x" and self.narrow:
                moved["title"] = wrapped(moved.get("title"))
            if key in self.shared:
                moved.pop("range", None)
                moved |= {"range": self.shared[key]} if self.shared[key] else {}
                moved |= {"matches": name} if self.i else {}
                if letter == "y" and not self.first:
                    moved |= {"showticklabels": False, "title": {"text": ""}, "ticks": ""}
            axes[axis_key(self.renamed(name))] = moved
        return axes

    def marks(self, kind: str) -> list[dict[str, Any]]:
        """Its shapes or annotations, moved into the panel."""
        marks = []
        for mark in self.spec["layout"].get(kind) or []:
            moved = dict(mark)
            for letter in "xy":
                axis = mark.get(f"{letter}ref", letter)
                moved[f"{letter}ref"] = self.reference(axis)
                for end in (letter, f"{letter}0", f"{letter}1") if axis == "paper" else ():
                    if isinstance(mark.get(end), int | float):
                        moved[end] = within(self.domain[letter], mark[end])
            marks.append(moved)
        return marks


def panel_title(name: str, domain: Domain, spec: Spec) -> dict[str, Any]:
    """The name of an audit above its panel, and above any annotation on the panel's upper edge."""
    crowned = any(
        note.get("yref") == "paper" and note.get("y") == 1 and note.get("yanchor") == "bottom"
        for note in spec["layout"].get("annotations") or []
    )
    return {
        "text": f"<b>{theme.verbatim(name)}</b>",
        "xref": "paper", "yref": "paper", "x": domain["x"][0], "y": domain["y"][1],
        "xanchor": "left", "yanchor": "bottom", "yshift": 20 if crowned else 5, "showarrow": False,
    }  # fmt: skip


def share_colors(data: Sequence[dict[str, Any]], layout: dict[str, Any]) -> None:
    """Give heat maps of the same quantity one colour scale."""
    maps: dict[str, list[dict[str, Any]]] = {}
    for trace in data:
        if trace.get("type") == "heatmap" and not trace.get("coloraxis"):
            bar = (trace.get("colorbar") or {}).get("title") or {}
            text = bar.get("text", "") if isinstance(bar, Mapping) else bar
            maps.setdefault(f"{trace.get('name', '')} {text}", []).append(trace)
    numbers = [int(key[9:] or 1) for key in layout if key.startswith("coloraxis")]
    for number, traces in enumerate(maps.values(), 1 + max(numbers, default=1)):
        first = traces[0]
        scale = {
            key: first[key] for key in ("colorscale", "colorbar", "showscale") if first.get(key) is not None
        }
        lows: list[Any] = [trace.get("zmin") for trace in traces]
        highs: list[Any] = [trace.get("zmax") for trace in traces]
        if None not in (*lows, *highs):  # plotly.js would use a single end as both
            scale |= {"cmin": min(lows), "cmax": max(highs)}
        layout[f"coloraxis{number}"] = scale
        for trace in traces:
            for key in COLORS:
                trace.pop(key, None)
            trace["coloraxis"] = f"coloraxis{number}"


def share_legend(data: Sequence[dict[str, Any]], alone: bool) -> None:
    """List each kind of trace once in the legend, which switches it in all panels.

    Args:
        alone: whether every panel has a single trace, and so would have no legend by itself.
    """
    listed: set[tuple[str, str]] = set()
    for trace in data:
        name, wanted = trace.get("name"), trace.get("showlegend")
        if not name or wanted is False or (alone and wanted is None):
            trace["showlegend"] = False
            continue
        group = str(trace.get("legendgroup") or name)
        trace |= {"legendgroup": group, "showlegend": (group, name) not in listed}
        listed.add((group, name))


def joint_menus(specs: Sequence[Spec]) -> dict[str, Any] | None:
    """The menu that every figure has, over the traces of all of them.

    Returns:
        Empty when no figure has one; None when the menus differ.
    """
    menus = [spec["layout"].get("updatemenus") or [] for spec in specs]
    if not any(menus):
        return {}
    if any(len(menu) != 1 for menu in menus):
        return None
    lists = [menu[0].get("buttons") or [] for menu in menus]
    if len({tuple(button.get("label") for button in buttons) for buttons in lists}) != 1:
        return None
    joint = []
    for same in zip(*lists, strict=True):
        visible: list[Any] = []
        for button, spec in zip(same, specs, strict=True):
            match button:
                case {"method": "restyle", "args": ["visible", flags]} if len(flags) == len(spec["data"]):
                    visible += flags
                case _:
                    return None
        joint.append({**same[0], "args": ["visible", visible]})
    return {**menus[0][0], "buttons": joint}
