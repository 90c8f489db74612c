"""`--set ANALYSIS.PARAM=VALUE`: text becomes what the parameter's annotation asks for."""

import sys
from collections.abc import Collection, Iterable, Sequence
from inspect import Parameter
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from diagnostics.core.analysis import EXECUTION, Analysis
from diagnostics.core.registry import find
from probes.errors import InputError, UnknownNameError

WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
NAMES = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "none"}


def parse(assignments: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Settings by analysis and parameter; of one that is given twice the last counts.

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
        known = [name for name in record.parameters if name not in EXECUTION]
        if name not in known:
            raise UnknownNameError(
                f"--set {text}: {analysis} has no parameter {name!r}; it has: {', '.join(known)}"
            )
        kind = kind_of(record, record.parameters[name])
        try:
            settings.setdefault(analysis, {})[name] = convert(value.strip(), kind)
        except ValueError as error:
            raise InputError(f"--set {text}: {error}") from None
    return settings


def kind_of(record: Analysis, parameter: Parameter) -> Any:
    """What a parameter takes: its annotation, or the type of its default where that cannot be read."""
    kind = parameter.annotation
    if isinstance(kind, str):
        try:
            kind = eval(kind, vars(sys.modules[record.function.__module__]))
        except NameError:  # imported for type checkers alone
            kind = parameter.empty
    return type(parameter.default) if kind in (parameter.empty, Any) else kind


def convert(text: str, kind: Any) -> Any:
    """The text as a value of a kind.

    Raises:
        InputError: it is none; the message says what would be.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for choice in sorted(arguments, key=lambda choice: choice is str):  # everything is a str: last
            try:
                return convert(text, choice)
            except ValueError:
                continue
        raise InputError(f"not {' or '.join(describe(choice) for choice in arguments)}")
    if origin is Literal:
        for choice in arguments:
            if str(choice) == text:
                return choice
        raise InputError(f"not {describe(kind)}")
    if origin in (tuple, list, Sequence, Collection, Iterable):
        items = []
        for item in filter(None, map(str.strip, text.split(","))):
            try:
                items.append(convert(item, (arguments or (str,))[0]))
            except ValueError as error:
                raise InputError(f"{item!r} is {error}; write several with commas between, a,b,c") from None
        return items if origin is list else tuple(items)
    if kind is str:
        return text
    if kind is NoneType and text.lower() == "none":
        return None
    if kind is bool and text.lower() in WORDS:
        return WORDS[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise InputError(f"not {describe(kind)}")


def describe(kind: Any) -> str:
    """What a value of a kind is, in words."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return NAMES.get(kind, getattr(kind, "__name__", str(kind)))
