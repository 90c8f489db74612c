"""Controls that keep their value in the address: the browser writes it there and restores it on "back".

A page gives a control the id `choice(…)`; `assets/tunescope.js` does the rest.
"""

from typing import Any, Literal

import dash_mantine_components as dmc
from dash import ALL, ClientsideFunction, Dash, Input, State

from dashboard.components.parts import Content
from dashboard.state import filters
from dashboard.state.query import Query
from diagnostics.core.analysis import Result

Kind = Literal["one", "many", "span", "number"]
OFF = "off"  # an empty number in an address


def choice(key: str, kind: Kind = "one", default: str = "") -> dict[str, str]:
    """The id of a control for a key of the query.

    Args:
        kind: one string, a list of strings, the two ends of a range, or a number that may be empty.
        default: the value, as an address writes it, that the address omits.
    """
    return {"role": "choose", "key": key, "kind": kind, "default": default}


def select(
    query: Query, key: str, label: str, options: list[Any], default: str = "", **props: Any
) -> dmc.Select:
    """A choice of one string. Options are strings, or `{"value", "label"}`."""
    empty = not default
    look = {"size": "sm", "allowDeselect": empty, "clearable": empty, "searchable": len(options) > 8, **props}
    value = query.value(key, default) or None
    return dmc.Select(id=choice(key, "one", default), label=label, data=options, value=value, **look)


def multi_select(query: Query, key: str, label: str, options: list[str], **props: Any) -> dmc.MultiSelect:
    """A choice of any number of strings; none means all."""
    look = {"size": "sm", "clearable": True, "searchable": len(options) > 8, "placeholder": "all", **props}
    value = [name for name in query.many(key) if name in options]
    return dmc.MultiSelect(id=choice(key, "many"), label=label, data=options, value=value, **look)


def number(query: Query, key: str, default: float | None, **props: Any) -> dmc.NumberInput:
    """A number, or nothing."""
    written = OFF if default is None else repr(default)
    try:
        value: float | str = float(query.value(key, written))
    except ValueError:
        value = ""
    look = {"size": "sm", "hideControls": True, "debounce": 200, **props}
    return dmc.NumberInput(id=choice(key, "number", written), value=value, **look)


def span(query: Query, key: str, label: str, low: int, high: int) -> dmc.InputWrapper:
    """A range of whole numbers; the full range filters nothing."""
    first, last = query.span(key) or (low, high)
    slider = dmc.RangeSlider(
        id=choice(key, "span", f"{low}-{high}"), value=[max(low, int(first)), min(high, int(last))],
        min=low, max=high, minRange=0, marks=[{"value": end, "label": str(end)} for end in (low, high)],
        thumbFromLabel=f"{label} from", thumbToLabel=f"{label} to", updatemode="mouseup", size="sm", mb="md",
    )  # fmt: skip
    return dmc.InputWrapper(slider, label=label, className="span")


def row_filters(result: Result, query: Query) -> list[Content]:
    """A control for each column that a result can be filtered by and that has at least two values."""
    controls: list[Content] = []
    layers = filters.layer_range(result.tables)
    if layers and layers[0] < layers[1]:
        controls.append(span(query, "layer", "Layers", *layers))
    for column in ("component", "group"):
        options = filters.values(result.tables, column)
        if len(options) > 1:
            controls.append(multi_select(query, column, f"{column.capitalize()}s", options))
    return controls


def callbacks(app: Dash) -> None:
    """Connect the controls of every page with the address."""
    every = {"role": "choose", "key": ALL, "kind": ALL, "default": ALL}
    app.clientside_callback(
        ClientsideFunction("tunescope", "chosen"), Input(every, "value"), prevent_initial_call=True
    )
    app.clientside_callback(
        ClientsideFunction("tunescope", "restored"),
        Input("url", "search"),
        State(every, "id"),
        State(every, "value"),
        prevent_initial_call=True,
    )
