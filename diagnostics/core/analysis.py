"""The one idea: an analysis is a function from checkpoints to a `Result`.

Pictures, findings, the report and the dashboard are derived from the result alone, so a saved audit shows all
that a fresh one does. `@analysis` records each function once; everything else reads that record.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.core.inputs import check_input_types
from probes.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from diagnostics.core.policy import Finding, Policy
    from probes.checkpoints.mask_file import Patch

# Where it runs, not what it measures: never part of what identifies a result.
EXECUTION = frozenset({"device", "progress", "cache"})


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one analysis measured.

    Attributes:
        metrics: plain numbers; a unit ends the name (`rise_nats`). What could not be measured is left out.
        tables: tidy frames: a row an observation, a column a variable; not measured is NaN.
        notes: what a reader must know: skipped, dropped, approximated.
        masks: what `tunescope graft` takes, by name; of a saved result, the files.
        analysis, parameters: filled in by `@analysis`; parameters as used, defaults included, as JSON keeps
            them (a tuple is a list), so that a saved result equals a fresh one.
    """

    metrics: Mapping[str, float | int]
    tables: "Mapping[str, pd.DataFrame]"
    notes: tuple[str, ...] = ()
    masks: "Mapping[str, Patch | Path]" = field(default_factory=dict)
    analysis: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def figures(self) -> "dict[str, go.Figure]":
        """The pictures of this result by name."""
        return find(self.analysis).draw(self)

    def summary(self) -> str:
        """The result in one line."""
        return find(self.analysis).summary(self)

    def findings(self, policy: "Policy | None" = None) -> "list[Finding]":
        """What is wrong, how badly, by which threshold and source; the default policy unless one is given."""
        from diagnostics.core.policy import default_policy, judge

        return judge(self, default_policy() if policy is None else policy)


class NotApplicableError(InputError):
    """An analysis can say nothing of such a model or of such data; the text says why, and what does instead.

    An audit of everything leaves it out; asked for by name, it is an error of the input.
    """


def metrics_in_a_line(result: Result) -> str:
    """The first metrics of a result, as `name value` with commas between."""
    return ", ".join(f"{name} {value:.4g}" for name, value in list(result.metrics.items())[:4])


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The registry's record of one analysis; the attributes are explained at `analysis`.

    Attributes:
        inputs: what an audit must supply for it to run.
        optional: what it uses when supplied.
        parameters: its keyword-only arguments.
    """

    name: str
    function: Callable[..., Result]
    question: str
    reading: str
    paper: str
    cost: str
    draw: "Callable[[Result], dict[str, go.Figure]]"
    summary: Callable[[Result], str]
    metrics: Mapping[str, str]
    inputs: tuple[str, ...]
    optional: tuple[str, ...]
    parameters: Mapping[str, inspect.Parameter]

    def describe(self) -> dict[str, Any]:
        """The record as JSON keeps it: what a person needs to choose it and to set it."""
        defaults = {name: p.default for name, p in self.parameters.items() if name not in EXECUTION}
        return {
            "question": self.question,
            "reading": self.reading,
            "needs": list(self.inputs),
            "uses": list(self.optional),
            "parameters": plain(defaults),
            "metrics": dict(self.metrics),
            "cost": self.cost,
            "paper": self.paper,
        }


REGISTRY: dict[str, Analysis] = {}


def analysis(
    name: str,
    *,
    question: str,
    reading: str,
    paper: str,
    cost: str,
    draw: "Callable[[Result], dict[str, go.Figure]]",
    summary: Callable[[Result], str] = metrics_in_a_line,
    metrics: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register a function as the analysis `name`.

    Its positional arguments are the inputs that an audit supplies (`pair`, `task`, `series`…; one with a
    default is optional); its keyword-only ones are parameters, recorded as used.

    Args:
        question: the one-line question it answers.
        reading: how to read its numbers: what 0 means, what is worrying, what is only noise.
        paper: source, as an arXiv number or a citation.
        cost: what it costs to run, in words.
        draw: from a result to its figures by name.
        summary: from a result to the one line that a reader wants first.
        metrics: every metric it can give, the most telling first, and what it says; a policy may name these.
            Left out, any name is taken and none is checked.
    """

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        arguments = inspect.signature(function).parameters.values()
        parameters = {p.name: p for p in arguments if p.kind is p.KEYWORD_ONLY}
        inputs = [p for p in arguments if p.kind is not p.KEYWORD_ONLY]

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Result:
            unknown = sorted(set(kwargs) - {p.name for p in arguments})
            if unknown:
                known = ", ".join(parameters)
                raise UnknownNameError(f"{name} has no parameter {unknown[0]!r}; it has: {known}")
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            check_input_types(name, {p.name: bound.arguments[p.name] for p in inputs})
            used = {k: v for k, v in bound.arguments.items() if k in parameters and k not in EXECUTION}
            result = function(*args, **kwargs)
            if metrics is not None:
                undeclared = sorted(set(result.metrics) - set(metrics))
                assert not undeclared, (
                    f"{name} gave metrics that its registration does not list: {undeclared}"
                )
                ordered = {metric: result.metrics[metric] for metric in metrics if metric in result.metrics}
                result = replace(result, metrics=ordered)
            return replace(result, analysis=name, parameters=plain(used))

        REGISTRY[name] = Analysis(
            name=name,
            function=measured,
            question=question,
            reading=reading,
            paper=paper,
            cost=cost,
            draw=draw,
            summary=summary,
            metrics=metrics or {},
            inputs=tuple(p.name for p in inputs if p.default is p.empty),
            optional=tuple(p.name for p in inputs if p.default is not p.empty),
            parameters=parameters,
        )
        return measured

    return register


def plain(value: Any) -> Any:
    """The value as JSON keeps it: tuples are lists; what JSON lacks (a dtype, a path) is its name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value))
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)


def installed() -> list[str]:
    """The names of every analysis that is installed, without importing any."""
    return sorted({entry.name for entry in entry_points(group="tunescope.analyses")} | set(REGISTRY))


def installed_analyses() -> dict[str, Analysis]:
    """Every analysis that is installed, by name, ours and those of other packages."""
    return {name: find(name) for name in installed()}


def find(name: str) -> Analysis:
    """The analysis called `name`; only its own module is imported.

    Raises:
        UnknownNameError: unknown name (the message lists the known ones), or its package is broken.
    """
    if name not in REGISTRY:
        for entry in entry_points(group="tunescope.analyses", name=name):
            load(entry)
    if name not in REGISTRY:
        raise UnknownNameError(f"unknown analysis {name!r}; known: {', '.join(installed())}")
    return REGISTRY[name]


def load(entry: Any) -> None:
    """Import the module behind an entry point, which registers its analysis.

    Args:
        entry: an `EntryPoint`; of `importlib_metadata` once any package has imported that, Dash among them.

    Raises:
        UnknownNameError: it cannot be imported, or registers another name.
    """
    package = entry.dist.name if entry.dist else "an unknown package"
    try:
        entry.load()
    except Exception as error:  # any plug-in may fail in any way; its name is what the user needs
        raise UnknownNameError(
            f"analysis {entry.name!r} of {package} cannot be loaded ({type(error).__name__}: {error}); "
            f"mend or uninstall that package, or leave it out with --skip {entry.name}"
        ) from error
    if entry.name not in REGISTRY:
        raise UnknownNameError(f"{entry.value} of {package} registers no analysis called {entry.name!r}")
