"""The one idea: an analysis is a function from checkpoints to a `Result`.

Pictures, findings, the report and the dashboard are derived from the result alone, so a saved audit shows all
that a fresh one does. `@analysis` records each function once; everything else reads that record.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from diagnostics.policy import Finding, Policy

# Where it runs, not what it measures: never part of what identifies a result.
EXECUTION = frozenset({"device", "progress"})


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one analysis measured.

    Attributes:
        metrics: plain numbers; a unit ends the name (`rise_nats`). What could not be measured is left out.
        tables: tidy frames: a row an observation, a column a variable; not measured is NaN.
        notes: what a reader must know: skipped, dropped, approximated.
        analysis, parameters: filled in by `@analysis`; parameters as used, defaults included.
    """

    metrics: Mapping[str, float | int]
    tables: "Mapping[str, pd.DataFrame]"
    notes: tuple[str, ...] = ()
    analysis: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def figures(self) -> "dict[str, go.Figure]":
        """The pictures of this result by name."""
        return find(self.analysis).draw(self)

    def findings(self, policy: "Policy | None" = None) -> "list[Finding]":
        """What is wrong, how badly, by which threshold and source; the default policy unless one is given."""
        from diagnostics.policy import default_policy, judge

        return judge(self, policy or default_policy())


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The registry's record of one analysis."""

    name: str
    function: Callable[..., Result]
    question: str
    reading: str
    paper: str
    cost: str
    draw: "Callable[[Result], dict[str, go.Figure]]"
    inputs: tuple[str, ...]
    parameters: Mapping[str, inspect.Parameter]


REGISTRY: dict[str, Analysis] = {}


def analysis(
    name: str,
    *,
    question: str,
    reading: str,
    paper: str,
    cost: str,
    draw: "Callable[[Result], dict[str, go.Figure]]",
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register a function as the analysis `name`.

    Its positional arguments are the inputs that an audit must supply (`pair`, `task`, `series`…); its
    keyword-only ones are parameters, recorded as used.

    Args:
        question: the one-line question it answers.
        reading: how to read its numbers: what 0 means, what is worrying, what is only noise.
        paper: source, as an arXiv number or a citation.
        cost: what it costs to run, in words.
        draw: from a result to its figures by name.
    """

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        signature = inspect.signature(function)
        inputs = tuple(p.name for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY)
        parameters = {p.name: p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Result:
            unknown = sorted(set(kwargs) - set(signature.parameters))
            if unknown:
                known = ", ".join(parameters)
                raise LookupError(f"{name} has no parameter {unknown[0]!r}; it has: {known}")
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            used = {k: v for k, v in bound.arguments.items() if k in parameters and k not in EXECUTION}
            return replace(function(*args, **kwargs), analysis=name, parameters=used)

        REGISTRY[name] = Analysis(
            name=name,
            function=measured,
            question=question,
            reading=reading,
            paper=paper,
            cost=cost,
            draw=draw,
            inputs=inputs,
            parameters=parameters,
        )
        return measured

    return register


def analyses() -> dict[str, Analysis]:
    """Every analysis that is installed, by name, ours and those of other packages."""
    for entry in entry_points(group="tunescope.analyses"):
        if entry.name not in REGISTRY:
            entry.load()
    return dict(REGISTRY)


def find(name: str) -> Analysis:
    """The analysis called `name`.

    Raises:
        LookupError: unknown name; the message lists the known ones.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    known = analyses()
    if name not in known:
        raise LookupError(f"unknown analysis {name!r}; known: {', '.join(sorted(known))}")
    return known[name]
