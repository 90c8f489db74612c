"""What a callback request of the browser must contain. Everything else is refused before Dash reads it."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from dash.dependencies import stringify_id

# The values that a component property may have; a property that is not listed may have any.
TYPES: Mapping[str, tuple[type, ...]] = {
    "search": (str,),
    "data": (str, list),
    "data-of": (str,),
    "opened": (bool,),
    "n_clicks": (int,),
    "style": (dict,),
    "clickData": (dict,),
    "cellClicked": (dict,),
    "getRowsRequest": (dict,),
}


def problem(body: Any, callbacks: Mapping[str, Mapping[str, Any]]) -> str:
    """Why a request cannot be answered; empty when it can.

    Args:
        callbacks: Dash's `callback_map`.
    """
    if not isinstance(body, dict):
        return "the body is not a JSON object"
    output = body.get("output")
    callback = callbacks.get(output) if isinstance(output, str) else None
    if callback is None or "callback" not in callback:
        return "output: this app has no such callback"
    changed = body.get("changedPropIds", [])
    if not isinstance(changed, list) or not all(map(is_property_name, changed)):
        return "changedPropIds: not a list of property names"
    expected, outputs = callback["output"], body.get("outputs")
    if not isinstance(expected, list):
        expected, outputs = [expected], [outputs]
    declared_outputs = [
        {"id": stringify_id(o.component_id), "property": o.component_property} for o in expected
    ]
    for name, items, declared, accepts in (
        ("outputs", outputs, declared_outputs, is_declared),
        ("inputs", body.get("inputs"), callback["inputs"], is_valid_value),
        ("state", body.get("state", []), callback["state"], is_valid_value),
    ):
        if not isinstance(items, list) or len(items) != len(declared):
            return f"{name}: {len(declared)} expected"
        for i, (item, spec) in enumerate(zip(items, declared, strict=True)):
            if not fits(item, spec, accepts):
                return f"{name}[{i}]: not a {spec['property']} of {spec['id']}"
    return ""


def fits(item: Any, spec: Mapping[str, str], accepts: Callable[[Any, Mapping[str, str]], bool]) -> bool:
    """Whether an input, state or output is what a callback declares; `ALL` declares a list."""
    if '["ALL"]' in spec["id"]:
        return isinstance(item, list) and all(accepts(member, spec) for member in item)
    return accepts(item, spec)


def is_declared(item: Any, spec: Mapping[str, str]) -> bool:
    """Whether the id and the property of an item are those that a callback declares."""
    if not isinstance(item, dict) or not isinstance(item.get("property"), str):
        return False
    if item["property"].partition("@")[0] != spec["property"]:  # `@…` tells duplicate outputs apart
        return False
    actual = item.get("id")
    if not spec["id"].startswith("{"):
        return actual == spec["id"]
    declared = json.loads(spec["id"])
    if not isinstance(actual, dict) or actual.keys() != declared.keys():
        return False
    return all(
        isinstance(actual[key], str) if isinstance(value, list) else actual[key] == value
        for key, value in declared.items()
    )


def is_valid_value(item: Any, spec: Mapping[str, str]) -> bool:
    """Whether an item is declared, and its value has a type that the property can have."""
    if not is_declared(item, spec):
        return False
    value = item.get("value")
    if spec["property"] == "id":
        return value == item["id"]
    if isinstance(value, bool) and bool not in TYPES.get(spec["property"], (bool,)):
        return False
    return value is None or isinstance(value, TYPES.get(spec["property"], (object,)))


def is_property_name(name: Any) -> bool:
    """Whether a name is `ID.PROPERTY`, with an id that is a string or a JSON object."""
    if not isinstance(name, str) or "." not in name:
        return False
    if not name.startswith("{"):
        return True
    try:
        return isinstance(json.loads(name.rpartition(".")[0]), dict)
    except (ValueError, RecursionError):
        return False
