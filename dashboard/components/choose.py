"""Controls whose value stands in the address: the browser writes it there, and back from there on "back".

A control with an id of `choice` is all that a page needs for that; `assets/choose.js` does the rest.
"""

from typing import Any, Literal

import dash_mantine_components as dmc
from dash import ALL, ClientsideFunction, Dash, Input, State

from dashboard.state.query import Query


def choice(key: str, kind: Literal["one", "many", "span"] = "one", default: str = "") -> dict[str, str]:
    """The id of a control for a key of the query.

    Args:
        kind: whether its value is one string, a list of them, or the two ends of a range.
        default: the value, as an address writes it, that is left out of the address.
    """
    return {"role": "choose", "key": key, "kind": kind, "default": default}


def one(
    query: Query, key: str, label: str, options: list[Any], default: str = "", **about: Any
) -> dmc.Select:
    """A choice of one of some strings, or of `{"value", "label"}`."""
    look = {"size": "sm", "allowDeselect": not default, "clearable": not default, **about}
    return dmc.Select(
        id=choice(key, "one", default),
        label=label,
        data=options,
        value=query.one(key, default) or None,
        **look,
    )


def many(query: Query, key: str, label: str, options: list[str], **about: Any) -> dmc.MultiSelect:
    """A choice of any of some strings; none means all."""
    look = {"size": "sm", "clearable": True, "searchable": len(options) > 8, "placeholder": "all", **about}
    return dmc.MultiSelect(
        id=choice(key, "many"),
        label=label,
        data=options,
        value=[value for value in query.many(key) if value in options],
        **look,
    )


def span(query: Query, key: str, label: str, low: int, high: int, **about: Any) -> dmc.InputWrapper:
    """A choice of a range of whole numbers; the whole of it means that nothing is left out."""
    chosen = query.span(key) or (low, high)
    marks = [{"value": low, "label": str(low)}, {"value": high, "label": str(high)}]
    return dmc.InputWrapper(
        dmc.RangeSlider(
            id=choice(key, "span", f"{low}-{high}"),
            min=low,
            max=high,
            step=1,
            minRange=0,
            value=[max(low, int(chosen[0])), min(high, int(chosen[1]))],
            marks=marks,
            thumbFromLabel=f"{label} from",
            thumbToLabel=f"{label} to",
            updatemode="mouseup",
            size="sm",
            mb="md",
            **about,
        ),
        label=label,
        className="span",
    )


def callbacks(app: Dash) -> None:
    """Tie the controls of every page to the address."""
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
