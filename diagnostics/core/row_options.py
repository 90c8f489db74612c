"""The parameters of every analysis that runs a model on rows, in one value."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from inspect import Parameter, Signature
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How rows are read and how models run on them.

    An analysis declares one keyword-only parameter, `options: RowOptions = RowOptions(dtype="float32")`.
    `@analysis` shows the fields in its place: as parameters, with these defaults and these explanations.

    Attributes:
        max_length: most tokens of a row; None: what the model takes.
        chat_template: texts and prompts are a user's messages.
        batch_tokens: most tokens in a batch; changes no result but by rounding.
        trust_remote_code: run code that a repository brings.
        device: where the model runs.
        dtype: of the model; None as stored.
    """

    max_length: int | None = None
    chat_template: bool = False
    batch_tokens: int = 16384
    trust_remote_code: bool = False
    device: str = "cpu"
    dtype: str | None = None

    @property
    def of_rows(self) -> dict[str, Any]:
        """What encoding rows takes."""
        return {name: getattr(self, name) for name in ("max_length", "chat_template", "batch_tokens")}

    @property
    def of_models(self) -> dict[str, Any]:
        """What opening a model takes."""
        return {name: getattr(self, name) for name in ("device", "dtype", "trust_remote_code")}


def options_of(signature: Signature) -> dict[str, RowOptions]:
    """The parameters of a signature that are row options, with their defaults."""
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    return {name: default for name, default in defaults.items() if isinstance(default, RowOptions)}


def with_fields(signature: Signature) -> Signature:
    """The signature with the fields of its row options in their place."""
    options = options_of(signature)
    parameters: list[Parameter] = []
    for name, parameter in signature.parameters.items():
        if name in options:
            parameters += [
                Parameter(
                    field.name, Parameter.KEYWORD_ONLY, annotation=field.type,
                    default=getattr(options[name], field.name),
                )
                for field in fields(options[name])
            ]  # fmt: skip
        else:
            parameters.append(parameter)
    return signature.replace(parameters=parameters)


def collected(signature: Signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `with_fields(signature)` as the function itself takes them."""
    rest = dict(arguments)
    for name, default in options_of(signature).items():
        values = {field.name: rest.pop(field.name) for field in fields(default)}
        rest[name] = type(default)(**values)
    return rest


def with_explanations(signature: Signature, docstring: str | None) -> str | None:
    """The docstring with a line for each field in the place of the row options.

    A field that the docstring explains itself, for this analysis means more by it, keeps that line.
    """
    if docstring is None:
        return None
    docstring = inspect.cleandoc(docstring)
    explained = re.findall(r"^    (\w+): (.*)$", inspect.cleandoc(RowOptions.__doc__ or ""), re.MULTILINE)
    for name in options_of(signature):
        lines = [f"    {field}: {text}" for field, text in explained if f"\n    {field}: " not in docstring]
        docstring = re.sub(rf"^    {name}: .*$", "\n".join(lines), docstring, flags=re.MULTILINE)
    return docstring
