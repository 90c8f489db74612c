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


@dataclass(frozen=True)
class Domain:
    """The area of a panel, as shares of the plotting area."""

    x: tuple[float, float]
    y: tuple[float, float]

    def within(self, letter: str, at: float) -> float:
        """The share of the plotting area at a share of the panel."""
        low, high = self.x if letter == "x" else self.y
        return low + at * (high - low)


def figure_panels(
    specs: Mapping[str, Spec], heights: Mapping[str, int], columns: int
) -> dict[str, Any] | None:
    """Several figures as panels of one; None where they cannot be joined.

    Args:
        specs: the figures by audit, in order.
        heights: the height of each figure alone, in pixels.
        columns: panels in a row.
    """
    names, figures = list(specs), list(specs.values())
    menus = joint_menus(figures)
    if menus is None or not all(map(is_cartesian, figures)):
        return None
    shared = shared_axes(figures)
    columns = max(1, min(columns, len(names)))
    rows = -(-len(names) // columns)
    more = LINE * (max(map(title_lines, figures)) - 1) if columns > 1 else 0
    gap, foot = GAP + more, FOOT + more
    inner = max(160, max(heights.values()) - HEAD - FOOT)
    drawn = rows * inner + (rows - 1) * gap
    domains = grid(len(names), columns, inner / drawn, column_gap(figures, shared), gap / drawn)
    layout: dict[str, Any] = {
        key: copy.deepcopy(value)
        for key, value in specs[names[0]]["layout"].items()
        if not AXIS.fullmatch(key) and key not in ("shapes", "annotations", "updatemenus", "height", "legend")
    }
    layout |= {"shapes": [], "annotations": []}
    data: list[dict[str, Any]] = []
    for i, (name, spec, domain) in enumerate(zip(names, figures, domains, strict=True)):
        panel = Panel(spec, i, domain, shared, first=i % columns == 0, narrow=columns > 1)
        data += panel.traces()
        layout |= panel.axes()
        layout["shapes"] += panel.marks("shapes")
        layout["annotations"] += [*panel.marks("annotations"), panel_title(name, domain, spec)]
    share_ranges(layout, figures, shared)
    share_colors(data, layout)
    share_legend(data, all(len(spec["data"]) == 1 for spec in figures))
    share_legend([shape for shape in layout["shapes"] if shape.get("showlegend")], alone=False)
    layout["height"] = drawn + HEAD + foot
    layout["margin"] = {"t": HEAD, "b": foot}
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1 + 30 / drawn, "yanchor": "bottom"}
    if menus:
        layout["updatemenus"] = [
            {**menus, "x": 1, "xanchor": "right", "y": 1 + 30 / drawn, "yanchor": "bottom"}
        ]
    return {"data": data, "layout": layout}


def is_cartesian(spec: Spec) -> bool:
    """Whether a figure has only x and y axes and no slider."""
    kinds = {trace.get("type", "scatter") for trace in spec["data"]}
    supported = {"scatter", "scattergl", "bar", "heatmap", "histogram", "box", "violin"}
    return bool(spec["data"]) and kinds <= supported and not spec["layout"].get("sliders")


def grid(count: int, columns: int, height: float, gap: float, between: float) -> list[Domain]:
    """The areas of the panels, row by row from the top."""
    width = (1 - gap * (columns - 1)) / columns
    domains = []
    for i in range(count):
        left, top = (i % columns) * (width + gap), 1 - (i // columns) * (height + between)
        domains.append(Domain((left, min(1.0, left + width)), (max(0.0, top - height), top)))
    return domains


def column_gap(specs: Sequence[Spec], shared: set[str]) -> float:
    """The gap between columns as a share of a page; only the first panel labels a shared y axis."""
    separate = [
        axis for spec in specs for key, axis in axes_of(spec).items() if key[0] == "y" and key not in shared
    ]
    if not separate:
        return 0.03
    longest = max(len(str(label)) for axis in separate for label in (axis.get("ticktext") or ["00000"]))
    return min(0.3, (longest * LETTER + 40) / PAGE)


def axes_of(spec: Spec) -> dict[str, dict[str, Any]]:
    """The axes of a figure by their keys, the implicit ones included."""
    named = {key: value for key, value in spec["layout"].items() if AXIS.fullmatch(key)}
    used = {
        letter + "axis" + trace.get(letter + "axis", letter)[1:] for trace in spec["data"] for letter in "xy"
    }
    return {key: dict(named.get(key) or {}) for key in sorted({*named, *used})}


def shared_axes(specs: Sequence[Spec]) -> set[str]:
    """The keys of the axes that measure the same thing in every figure."""
    every = [axes_of(spec) for spec in specs]
    common = set(every[0]).intersection(*every[1:])

    def measure(axis: Mapping[str, Any]) -> tuple[Any, ...]:
        title = axis.get("title") or {}
        return (
            title.get("text") if isinstance(title, Mapping) else title,
            axis.get("type"),
            axis.get("tickformat"),
            repr(axis.get("tickvals")),
            repr(axis.get("ticktext")),
            repr(axis.get("categoryarray")),
            is_reversed(axis),
        )

    return {key for key in common if len({measure(axes[key]) for axes in every}) == 1}


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
    letter, axis = key[0], key[0] + key[5:]
    values = np.concatenate(
        [
            np.empty(0),
            *(
                trace_numbers(trace.get(letter))
                for spec in specs
                for trace in spec["data"]
                if trace.get(f"{letter}axis", letter) == axis
            ),
        ]
    )
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


def is_reversed(axis: Mapping[str, Any]) -> bool:
    """Whether an axis runs backwards."""
    ends: Any = axis.get("range")
    return axis.get("autorange") == "reversed" or (is_numeric_range(ends) and ends[0] > ends[1])


def is_numeric_range(ends: Any) -> bool:
    """Whether both ends of a range are numbers."""
    return (
        isinstance(ends, list | tuple)
        and len(ends) == 2
        and all(isinstance(end, int | float) for end in ends)
    )


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
        shared: the keys of the axes that it shares with the first panel.
        first: whether it is the first of its row.
        narrow: whether it shares its row, so that long titles wrap.
    """

    spec: Spec
    i: int
    domain: Domain
    shared: set[str]
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
            moved = {
                part: self.reference(value) if part in REFERENCES else value for part, value in axis.items()
            }
            moved["domain"] = [self.domain.within(letter, end) for end in axis.get("domain", (0, 1))]
            moved.setdefault("anchor", self.renamed(("y" if letter == "x" else "x") + key[5:]))
            if letter == "x" and self.narrow:
                moved["title"] = wrapped(moved.get("title"))
            if key in self.shared and self.i:
                moved["matches"] = name
            if key in self.shared and letter == "y" and not self.first:
                moved |= {"showticklabels": False, "title": {"text": ""}, "ticks": ""}
            axes[f"{letter}axis{self.renamed(name)[1:]}"] = moved
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
                        moved[end] = self.domain.within(letter, mark[end])
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
        "xref": "paper", "yref": "paper", "x": domain.x[0], "y": domain.y[1],
        "xanchor": "left", "yanchor": "bottom", "yshift": 20 if crowned else 5, "showarrow": False,
    }  # fmt: skip


def share_ranges(layout: dict[str, Any], specs: Sequence[Spec], shared: set[str]) -> None:
    """Give shared axes a range that contains the ranges of all figures."""
    for key in shared:
        ends = united(axes_of(spec)[key].get("range") for spec in specs)
        # plotly.js makes the joint range of logarithmic axes far too wide.
        if ends is None and axes_of(specs[0])[key].get("type") == "log":
            ends = log_range(specs, key)
        for i in range(len(specs)):
            name = key[0] + key[5:]
            number = int(name[1:] or 1) + 10 * i
            axis = layout[f"{key[:5]}{number if number > 1 else ''}"]
            axis.pop("range", None)
            if ends:
                axis["range"] = ends


def share_colors(data: Sequence[dict[str, Any]], layout: dict[str, Any]) -> None:
    """Give heat maps of the same quantity one colour scale."""
    names: dict[str, str] = {}
    last = max([int(key[9:] or 1) for key in layout if key.startswith("coloraxis")] or [1])
    for trace in data:
        if trace.get("type") != "heatmap" or trace.get("coloraxis"):
            continue
        bar = (trace.get("colorbar") or {}).get("title") or {}
        quantity = f"{trace.get('name', '')} {bar.get('text', '') if isinstance(bar, Mapping) else bar}"
        low, high = trace.get("zmin"), trace.get("zmax")
        if quantity not in names:
            last += 1
            names[quantity] = f"coloraxis{last}"
            keys = ("colorscale", "colorbar", "showscale")
            kept = {key: trace[key] for key in keys if trace.get(key) is not None}
            layout[names[quantity]] = {**kept, "cmin": low, "cmax": high}
        axis = layout[names[quantity]]
        for end, value, widest in (("cmin", low, min), ("cmax", high, max)):
            both = (axis[end], value)
            axis[end] = widest(both) if None not in both else None
        for key in COLORS:
            trace.pop(key, None)
        trace["coloraxis"] = names[quantity]
    for name in names.values():
        # plotly.js would use a single end as both.
        if layout[name]["cmin"] is None or layout[name]["cmax"] is None:
            del layout[name]["cmin"], layout[name]["cmax"]


def share_legend(data: Sequence[dict[str, Any]], alone: bool) -> None:
    """List each kind of trace once in the legend, which switches it in all panels.

    Args:
        alone: whether every panel has a single trace, and so would have no legend by itself.
    """
    listed: set[str] = set()
    for trace in data:
        name = trace.get("name")
        wanted = trace.get("showlegend")
        if not name or wanted is False or (alone and wanted is None):
            trace["showlegend"] = False
            continue
        group = str(trace.get("legendgroup") or name)
        trace |= {"legendgroup": group, "showlegend": f"{group}\n{name}" not in listed}
        listed.add(f"{group}\n{name}")


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
            args = button.get("args") or []
            if button.get("method") != "restyle" or len(args) != 2 or args[0] != "visible":
                return None
            if len(args[1]) != len(spec["data"]):
                return None
            visible += args[1]
        joint.append({**same[0], "args": ["visible", visible]})
    return {**menus[0][0], "buttons": joint}
