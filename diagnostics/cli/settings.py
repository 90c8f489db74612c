"""`--set ANALYSIS.PARAM=VALUE`: text is converted to the type of the parameter's annotation."""

import sys
from collections.abc import Collection, Iterable, Sequence
from inspect import Parameter
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from diagnostics.core.analysis import Analysis
from diagnostics.core.registry import find
from probes.errors import InputError, UnknownNameError

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "none"}


def parse_settings(assignments: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Settings by analysis and parameter; the last one counts when one is given twice.

    >>> parse_settings(["intruders.k=20", "intruders.parts=block,head"])
    {'intruders': {'k': 20, 'parts': ('block', 'head')}}

    Raises:
        InputError: not of this form, or a value of the wrong kind.
        UnknownNameError: unknown analysis or parameter; the message lists the known ones.
    """
    settings: dict[str, dict[str, Any]] = {}
    for text in assignments:
        where, equals, value = text.partition("=")
        analysis, dot, name = where.partition(".")
        if not (equals and dot):
            raise InputError(f"--set {text}: write ANALYSIS.PARAM=VALUE, as in --set intruders.k=20")
        record = find(analysis)
        if name not in record.defaults:
            raise UnknownNameError(
                f"--set {text}: {analysis} has no parameter {name!r}; it has: {', '.join(record.defaults)}"
            )
        kind = parameter_type(record, record.parameters[name])
        try:
            settings.setdefault(analysis, {})[name] = convert_text(value.strip(), kind)
        except InputError as error:
            raise InputError(f"--set {text}: {error}") from None
    return settings


def parameter_type(record: Analysis, parameter: Parameter) -> Any:
    """The annotation of a parameter, or the type of its default where the annotation cannot be read."""
    kind = parameter.annotation
    if isinstance(kind, str):
        try:
            kind = eval(kind, vars(sys.modules[record.function.__module__]))
        except NameError:  # imported for type checkers only
            kind = parameter.empty
    return type(parameter.default) if kind in (parameter.empty, Any) else kind


def convert_text(text: str, kind: Any) -> Any:
    """The text as a value of a type; an InputError says what is expected."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for choice in sorted(arguments, key=lambda choice: choice is str):  # any text is a str: try it last
            try:
                return convert_text(text, choice)
            except InputError:
                continue
        raise InputError(f"not {' or '.join(type_name(choice) for choice in arguments)}")
    if origin is Literal:
        for choice in arguments:
            if str(choice) == text:
                return choice
        raise InputError(f"not {type_name(kind)}")
    if origin in (tuple, list, Sequence, Collection, Iterable):
        items = []
        for item in filter(None, map(str.strip, text.split(","))):
            try:
                items.append(convert_text(item, (arguments or (str,))[0]))
            except InputError as error:
                raise InputError(f"{item!r} is {error}; write several with commas between, a,b,c") from None
        return items if origin is list else tuple(items)
    if kind is str:
        return text
    if kind is NoneType and text.lower() == "none":
        return None
    if kind is bool and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise InputError(f"not {type_name(kind)}")


def type_name(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return TYPE_NAMES.get(kind, getattr(kind, "__name__", str(kind)))
