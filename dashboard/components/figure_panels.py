"""The same figure of several audits in one: panels side by side on axes that they share.

plotly.js itself keeps the axes of the panels together, so that one look compares them and a zoom into one is
a zoom into all. Axes that do not measure the same are left apart.
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
TITLE = 34  # letters of an axis title that fit below a panel beside another
LINE = 18  # pixels: one more line of it
PAGE, LETTER = 1060, 7  # pixels: a figure on a wide page, and a letter of a label
AXIS = re.compile(r"([xy])axis(\d*)")
# Where an axis, a mark or a note says which axis it stands on.
TIED = ("anchor", "overlaying", "matches", "scaleanchor")
COLORS = (
    "zmin",
    "zmax",
    "zmid",
    "zauto",
    "colorscale",
    "autocolorscale",
    "reversescale",
    "colorbar",
    "showscale",
)


@dataclass(frozen=True)
class Place:
    """Where a panel lies, in shares of what is drawn on."""

    x: tuple[float, float]
    y: tuple[float, float]

    def within(self, letter: str, at: float) -> float:
        """Where in the whole a share of the panel lies."""
        low, high = self.x if letter == "x" else self.y
        return low + at * (high - low)


def figure_panels(
    specs: Mapping[str, Spec], heights: Mapping[str, int], columns: int
) -> dict[str, Any] | None:
    """One figure of several; None where panels cannot be put together.

    Args:
        specs: figures by the name of the audit that each is of, in order.
        heights: of each by itself, in pixels.
        columns: panels in a row.
    """
    names = list(specs)
    if not all(plain(spec) for spec in specs.values()):
        return None
    menus = joint_menus(list(specs.values()))
    if menus is None:
        return None
    shared = shared_axes(list(specs.values()))
    columns = max(1, min(columns, len(names)))
    rows = -(-len(names) // columns)
    more = LINE * (max(map(lines, specs.values())) - 1) if columns > 1 else 0
    gap, foot = GAP + more, FOOT + more
    inner = max(160, max(heights.values()) - HEAD - FOOT)
    drawn = rows * inner + (rows - 1) * gap
    places = grid(len(names), columns, inner / drawn, gaps(list(specs.values()), shared), gap / drawn)
    layout: dict[str, Any] = {
        key: copy.deepcopy(value)
        for key, value in specs[names[0]]["layout"].items()
        if not AXIS.fullmatch(key) and key not in ("shapes", "annotations", "updatemenus", "height", "legend")
    }
    layout |= {"shapes": [], "annotations": []}
    data: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        panel = Panel(specs[name], i, places[i], shared, first=i % columns == 0, narrow=columns > 1)
        data += panel.traces()
        layout |= panel.axes()
        layout["shapes"] += panel.marks("shapes")
        layout["annotations"] += [*panel.marks("annotations"), headed(name, places[i], specs[name])]
    unite(layout, list(specs.values()), shared)
    colored(data, layout)
    named_once(data, all(len(spec["data"]) == 1 for spec in specs.values()))
    named_once([shape for shape in layout["shapes"] if shape.get("showlegend")], alone=False)
    layout["height"] = drawn + HEAD + foot
    layout["margin"] = {"t": HEAD, "b": foot}
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1 + 30 / drawn, "yanchor": "bottom"}
    if menus:
        layout["updatemenus"] = [
            {**menus, "x": 1, "xanchor": "right", "y": 1 + 30 / drawn, "yanchor": "bottom"}
        ]
    return {"data": data, "layout": layout}


def plain(spec: Spec) -> bool:
    """Whether a figure stands on nothing but x and y axes."""
    kinds = {trace.get("type", "scatter") for trace in spec["data"]}
    known = {"scatter", "scattergl", "bar", "heatmap", "histogram", "box", "violin"}
    return bool(spec["data"]) and kinds <= known and not spec["layout"].get("sliders")


def grid(count: int, columns: int, height: float, gap: float, between: float) -> list[Place]:
    """The places of panels, row by row from the top."""
    width = (1 - gap * (columns - 1)) / columns
    made = []
    for i in range(count):
        left, top = (i % columns) * (width + gap), 1 - (i // columns) * (height + between)
        made.append(Place((left, min(1.0, left + width)), (max(0.0, top - height), top)))
    return made


def gaps(specs: Sequence[Spec], shared: set[str]) -> float:
    """How far panels stand apart, in shares of a page: shared y axes have labels at the first panel alone."""
    own = [
        axis for spec in specs for key, axis in axes_of(spec).items() if key[0] == "y" and key not in shared
    ]
    if not own:
        return 0.03
    longest = max(len(str(label)) for axis in own for label in (axis.get("ticktext") or ["00000"]))
    return min(0.3, (longest * LETTER + 40) / PAGE)


def axes_of(spec: Spec) -> dict[str, dict[str, Any]]:
    """The axes of a figure by their keys; those that go without saying too."""
    named = {key: value for key, value in spec["layout"].items() if AXIS.fullmatch(key)}
    used = {
        letter + "axis" + trace.get(letter + "axis", letter)[1:] for trace in spec["data"] for letter in "xy"
    }
    return {key: dict(named.get(key) or {}) for key in sorted({*named, *used})}


def shared_axes(specs: Sequence[Spec]) -> set[str]:
    """The keys of the axes that measure the same in every figure."""
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
            down(axis),
        )

    return {key for key in common if len({measure(axes[key]) for axes in every}) == 1}


def broken(title: Any) -> Any:
    """An axis title in lines that fit below a panel beside another."""
    if not isinstance(title, Mapping) or not title.get("text") or "<" in title["text"]:
        return title
    return {**title, "text": "<br>".join(textwrap.wrap(title["text"], TITLE))}


def lines(spec: Spec) -> int:
    """Most lines of a title below a panel of a figure."""
    titles = [broken(axis.get("title")) for key, axis in axes_of(spec).items() if key[0] == "x"]
    texts = [title.get("text") or "" for title in titles if isinstance(title, Mapping)]
    return 1 + max((text.count("<br>") for text in texts), default=0)


def spanned(specs: Sequence[Spec], key: str) -> list[float] | None:
    """The range, in powers of ten, of all that is drawn on a logarithmic axis; None where nothing can be."""
    letter, axis = key[0], key[0] + key[5:]
    found = [
        np.log10(values[np.isfinite(values) & (values > 0)])
        for spec in specs
        for trace in spec["data"]
        if trace.get(f"{letter}axis", letter) == axis
        for values in [plain_numbers(trace.get(letter))]
    ]
    whole = np.concatenate([np.empty(0), *found])
    if not whole.size:
        return None
    margin = 0.05 * float(np.ptp(whole)) or 0.1
    return [float(whole.min()) - margin, float(whole.max()) + margin]


def plain_numbers(values: Any) -> np.ndarray:
    """The numbers of a trace, in either form that plotly.js reads; none where they are others."""
    if isinstance(values, Mapping):
        return np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"]).astype(float)
    try:
        return np.array(values if values is not None else [], dtype=float).ravel()
    except (TypeError, ValueError):
        return np.empty(0)


def down(axis: Mapping[str, Any]) -> bool:
    """Whether an axis runs backwards."""
    ends: Any = axis.get("range")
    return axis.get("autorange") == "reversed" or (numbers(ends) and ends[0] > ends[1])


def numbers(ends: Any) -> bool:
    """Whether a range has two numbers for its ends."""
    return (
        isinstance(ends, list | tuple)
        and len(ends) == 2
        and all(isinstance(end, int | float) for end in ends)
    )


def united(ranges: Iterable[Any]) -> list[float] | None:
    """The range that holds all of some; None unless each of them is given in numbers."""
    given = list(ranges)
    if not all(map(numbers, given)):
        return None
    low, high = min(min(ends) for ends in given), max(max(ends) for ends in given)
    return [high, low] if given[0][0] > given[0][1] else [low, high]


@dataclass(frozen=True)
class Panel:
    """One figure, to be drawn as the i-th panel of several.

    Attributes:
        shared: the keys of the axes that are those of the first panel.
        first: whether it is the first of its row.
        narrow: whether others stand beside it, so that long titles take several lines.
    """

    spec: Spec
    i: int
    place: Place
    shared: set[str]
    first: bool
    narrow: bool

    def moved(self, axis: str) -> str:
        """How an axis such as `x2` is called among all panels: ten apart, so that no two meet."""
        number = int(axis[1:] or 1) + 10 * self.i
        return axis[0] + (str(number) if number > 1 else "")

    def tied(self, to: Any) -> Any:
        """What an axis is tied to, called by its new name; `free`, `paper` and the like stay."""
        if not isinstance(to, str):
            return to
        return re.sub(r"^([xy]\d*)(?= domain$|$)", lambda found: self.moved(found[0]), to)

    def traces(self) -> list[dict[str, Any]]:
        """Its traces on their new axes."""
        return [
            {
                **trace,
                "xaxis": self.moved(trace.get("xaxis", "x")),
                "yaxis": self.moved(trace.get("yaxis", "y")),
            }
            for trace in self.spec["data"]
        ]

    def axes(self) -> dict[str, dict[str, Any]]:
        """Its axes, each in its part of the whole."""
        made = {}
        for key, axis in axes_of(self.spec).items():
            letter, own = key[0], key[0] + key[5:]
            about = {name: self.tied(value) if name in TIED else value for name, value in axis.items()}
            low, high = axis.get("domain", (0, 1))
            about["domain"] = [self.place.within(letter, low), self.place.within(letter, high)]
            about.setdefault("anchor", self.moved(("y" if letter == "x" else "x") + key[5:]))
            if letter == "x" and self.narrow:
                about["title"] = broken(about.get("title"))
            if key in self.shared:
                about |= self.alike(own, letter)
            name = self.moved(own)
            made[f"{letter}axis{name[1:]}"] = about
        return made

    def alike(self, own: str, letter: str) -> dict[str, Any]:
        """What makes a shared axis one with the first panel's."""
        about: dict[str, Any] = {"matches": own} if self.i else {}
        if letter == "y" and not self.first:
            about |= {"showticklabels": False, "title": {"text": ""}, "ticks": ""}
        return about

    def marks(self, kind: str) -> list[dict[str, Any]]:
        """Its shapes or notes, each where its panel is."""
        made = []
        for mark in self.spec["layout"].get(kind) or []:
            moved = dict(mark)
            for letter in "xy":
                ref = mark.get(f"{letter}ref", letter)
                moved[f"{letter}ref"] = self.tied(ref)
                for at in (letter, f"{letter}0", f"{letter}1") if ref == "paper" else ():
                    if isinstance(mark.get(at), int | float):
                        moved[at] = self.place.within(letter, mark[at])
            made.append(moved)
        return made


def headed(name: str, place: Place, spec: Spec) -> dict[str, Any]:
    """The name of an audit above its panel, and above what the panel has there."""
    notes = spec["layout"].get("annotations") or []
    crowned = any(
        note.get("yref") == "paper" and note.get("y") == 1 and note.get("yanchor") == "bottom"
        for note in notes
    )
    return {
        "text": f"<b>{theme.verbatim(name)}</b>",
        "xref": "paper", "yref": "paper", "x": place.x[0], "y": place.y[1],
        "xanchor": "left", "yanchor": "bottom", "yshift": 20 if crowned else 5, "showarrow": False,
    }  # fmt: skip


def unite(layout: dict[str, Any], specs: Sequence[Spec], shared: set[str]) -> None:
    """Give shared axes a range that holds what each of the figures shows by itself."""
    for key in shared:
        given = [axes_of(spec)[key].get("range") for spec in specs]
        ends = united(given)
        # plotly.js leaves such axes far too much room when it ranges them together.
        if ends is None and axes_of(specs[0])[key].get("type") == "log":
            ends = spanned(specs, key)
        for i in range(len(specs)):
            name = key[0] + key[5:]
            number = int(name[1:] or 1) + 10 * i
            axis = layout[f"{key[:5]}{number if number > 1 else ''}"]
            axis.pop("range", None)
            if ends:
                axis["range"] = ends


def colored(data: Sequence[dict[str, Any]], layout: dict[str, Any]) -> None:
    """Give the maps that stand for the same one scale of colours."""
    seen: dict[str, str] = {}
    own = max([int(key[9:] or 1) for key in layout if key.startswith("coloraxis")] or [1])
    for trace in data:
        if trace.get("type") != "heatmap" or trace.get("coloraxis"):
            continue
        bar = (trace.get("colorbar") or {}).get("title") or {}
        what = f"{trace.get('name', '')} {bar.get('text', '') if isinstance(bar, Mapping) else bar}"
        low, high = trace.get("zmin"), trace.get("zmax")
        if what not in seen:
            own += 1
            seen[what] = f"coloraxis{own}"
            kept = {
                key: trace[key]
                for key in ("colorscale", "colorbar", "showscale")
                if trace.get(key) is not None
            }
            layout[seen[what]] = {**kept, "cmin": low, "cmax": high}
        axis = layout[seen[what]]
        for end, value, widest in (("cmin", low, min), ("cmax", high, max)):
            both = (axis[end], value)
            axis[end] = widest(both) if None not in both else None
        for key in COLORS:
            trace.pop(key, None)
        trace["coloraxis"] = seen[what]
    for name in seen.values():
        # One end alone would be taken for both.
        if layout[name]["cmin"] is None or layout[name]["cmax"] is None:
            layout[name] = {key: value for key, value in layout[name].items() if key not in ("cmin", "cmax")}


def named_once(data: Sequence[dict[str, Any]], alone: bool) -> None:
    """Let the legend name each kind of trace once, and switch it in all panels.

    Args:
        alone: whether every panel has but one trace, and so would have no legend by itself.
    """
    named: set[str] = set()
    for trace in data:
        name = trace.get("name")
        asked = trace.get("showlegend")
        if not name or asked is False or (alone and asked is None):
            trace["showlegend"] = False
            continue
        group = str(trace.get("legendgroup") or name)
        trace |= {"legendgroup": group, "showlegend": f"{group}\n{name}" not in named}
        named.add(f"{group}\n{name}")


def joint_menus(specs: Sequence[Spec]) -> dict[str, Any] | None:
    """The choice between pictures that every figure offers, over the traces of all.

    Returns:
        Empty when none offers one; None when the choices are not the same.
    """
    menus = [spec["layout"].get("updatemenus") or [] for spec in specs]
    if not any(menus):
        return {}
    if any(len(menu) != 1 for menu in menus):
        return None
    lists = [menu[0].get("buttons") or [] for menu in menus]
    if len({tuple(button.get("label") for button in buttons) for buttons in lists}) != 1:
        return None
    made = []
    for together in zip(*lists, strict=True):
        shown: list[Any] = []
        for button, spec in zip(together, specs, strict=True):
            args = button.get("args") or []
            if button.get("method") != "restyle" or len(args) != 2 or args[0] != "visible":
                return None
            if len(args[1]) != len(spec["data"]):
                return None
            shown += args[1]
        made.append({**together[0], "args": ["visible", shown]})
    return {**menus[0][0], "buttons": made}
