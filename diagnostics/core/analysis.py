"""The one idea: an analysis is a function from checkpoints to a `Result`.

Pictures, findings, the report and the dashboard are derived from the result alone, so a saved audit shows all
that a fresh one does. `@analysis` records each function once; everything else reads that record.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.core import display, registry, row_options
from diagnostics.core.inputs import check_input_types
from probes.errors import NotApplicableError as NotApplicableError
from probes.errors import UnknownNameError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from diagnostics.core.policy import Finding, Policy
    from probes.checkpoints.mask_file import Patch

# Where it runs, not what it measures: never part of what identifies a result.
EXECUTION = frozenset({"device", "progress", "cache"})


@dataclass(frozen=True, kw_only=True)
class Result:
    """The metrics and tables of one analysis.

    >>> result = Result(analysis="path", metrics={"bump_task_nats": 0.25}, tables={})
    >>> [finding.metric for finding in result.findings()]
    ['bump_task_nats']

    Attributes:
        metrics: plain numbers; a unit ends the name (`rise_nats`). What could not be measured is left out.
        tables: tidy frames: a row an observation, a column a variable; not measured is NaN.
        notes: caveats: what was skipped, dropped or approximated.
        masks: masks for `tunescope graft` by name; of a saved result, their files.
        analysis, parameters: filled in by `@analysis`; parameters as used, defaults included, as JSON keeps
            them (a tuple is a list), so that a saved result equals a fresh one.
    """

    metrics: Mapping[str, float | int]
    tables: "Mapping[str, pd.DataFrame]"
    notes: tuple[str, ...] = ()
    masks: "Mapping[str, Patch | Path]" = field(default_factory=dict)
    analysis: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return display.text(self, self._record())

    def _repr_html_(self) -> str:
        return display.html(self, self._record())

    def _record(self) -> "Analysis | None":
        try:
            return registry.find(self.analysis)
        except UnknownNameError:
            return None

    def figures(self) -> "dict[str, go.Figure]":
        """The figures of this result by name."""
        return registry.find(self.analysis).draw(self)

    def summary(self) -> str:
        """The result in one line."""
        return registry.find(self.analysis).summary(self)

    def findings(self, policy: "Policy | None" = None) -> "list[Finding]":
        """The metrics beyond a threshold of a policy, the default one unless one is given."""
        from diagnostics.core.policy import default_policy, judge

        return judge(self, default_policy() if policy is None else policy)


def metrics_in_a_line(result: Result) -> str:
    """The first metrics of a result, as `name value` with commas between."""
    return ", ".join(f"{name} {value:.4g}" for name, value in list(result.metrics.items())[:4])


@dataclass(frozen=True, kw_only=True)
class DeviceTest:
    """How a test compares an analysis on a GPU with the same on a CPU, on the bundled checkpoints.

    Attributes:
        parameters: few rows and steps; what is compared is the arithmetic, not the answer.
        absolute: by how much a metric may differ; for counts, and for shares of few rows.
        relative: the same, as a share of the metric.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    absolute: Mapping[str, float | int] = field(default_factory=dict)
    relative: Mapping[str, float | int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The registry's record of one analysis; `analysis` explains the attributes that are not listed here.

    Attributes:
        parameters: its keyword-only arguments, the fields of `RowOptions` among them.
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
    unshared: tuple[str, ...]
    device_test: DeviceTest | None
    preflight: bool
    inputs: tuple[str, ...]  # what an audit must supply for it to run
    optional: tuple[str, ...]  # what it uses when supplied
    parameters: Mapping[str, inspect.Parameter]

    @property
    def defaults(self) -> dict[str, Any]:
        """The parameters that can be set, with their defaults."""
        return {name: p.default for name, p in self.parameters.items() if name not in EXECUTION}

    def describe(self) -> dict[str, Any]:
        """The record as JSON keeps it: what a person needs to choose the analysis and to set it."""
        return {
            "question": self.question, "reading": self.reading, "needs": list(self.inputs),
            "uses": list(self.optional), "parameters": plain(self.defaults), "metrics": dict(self.metrics),
            "cost": self.cost, "paper": self.paper,
        }  # fmt: skip


def analysis(
    name: str, *, question: str, reading: str, paper: str, cost: str,
    draw: "Callable[[Result], dict[str, go.Figure]]", summary: Callable[[Result], str] = metrics_in_a_line,
    metrics: Mapping[str, str] | None = None, unshared: tuple[str, ...] = (),
    device_test: DeviceTest | None = None, preflight: bool = False,
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:  # fmt: skip
    """Register a function as the analysis `name`.

    Its positional arguments are the inputs that an audit supplies (`pair`, `task`, `series`…; one with a
    default is optional). Its keyword-only arguments are parameters, recorded as used; one that is a
    `RowOptions` stands for its fields. The rules that judge it are in the `policy.toml` in its folder.

    Args:
        question: the one-line question it answers.
        reading: how to read its numbers: what 0 means, what is worrying, what is only noise.
        paper: source, as an arXiv number or a citation.
        cost: what it costs to run, in words.
        draw: from a result to its figures by name.
        summary: from a result to the one line that a reader wants first.
        metrics: every metric it can give, the most telling first, and its meaning; a policy may name these.
            Left out, any name is taken and none is checked.
        unshared: parameters that an audit's option of the same name does not set, because they mean
            something else here: `dtype` is the model's there.
        device_test: how results on a GPU are tested; for an analysis with a `device`.
        preflight: checks the files themselves: it comes first in every audit, report and dashboard, and
            `tunescope check` runs it alone.
    """

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        declared = inspect.signature(function)
        signature = row_options.with_fields(declared)
        arguments = signature.parameters.values()
        parameters = {p.name: p for p in arguments if p.kind is p.KEYWORD_ONLY}
        inputs = [p for p in arguments if p.kind is not p.KEYWORD_ONLY]

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Result:
            unknown = sorted(set(kwargs) - set(signature.parameters))
            if unknown:
                raise UnknownNameError(
                    f"{name} has no parameter {unknown[0]!r}; it has: {', '.join(parameters)}"
                )
            # Types first: a pair in the place of a series is the fault, not the task that is missing then.
            supplied = signature.bind_partial(*args, **kwargs).arguments
            check_input_types(name, {p.name: supplied[p.name] for p in inputs if p.name in supplied})
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            used = {k: v for k, v in bound.arguments.items() if k in parameters and k not in EXECUTION}
            call = inspect.BoundArguments(declared, row_options.collected(declared, bound.arguments))
            result = function(*call.args, **call.kwargs)
            if metrics is not None:
                undeclared = sorted(set(result.metrics) - set(metrics))
                assert not undeclared, (
                    f"{name} gave metrics that its registration does not list: {undeclared}"
                )
                ordered = {metric: result.metrics[metric] for metric in metrics if metric in result.metrics}
                result = replace(result, metrics=ordered)
            notes = (*result.notes, *other_bases(supplied.values()))
            return replace(result, analysis=name, parameters=plain(used), notes=notes)

        measured.__signature__ = signature  # type: ignore[attr-defined]
        measured.__doc__ = row_options.with_explanations(declared, function.__doc__)
        registry.REGISTRY[name] = Analysis(
            name=name, function=measured, question=question, reading=reading, paper=paper, cost=cost,
            draw=draw, summary=summary, metrics=metrics or {}, unshared=unshared, device_test=device_test,
            preflight=preflight,
            inputs=tuple(p.name for p in inputs if p.default is p.empty),
            optional=tuple(p.name for p in inputs if p.default is not p.empty), parameters=parameters,
        )  # fmt: skip
        return measured

    return register


def other_bases(inputs: Iterable[Any]) -> tuple[str, ...]:
    """A sentence on each adapter among the inputs that is applied to another base than it names."""
    from probes.checkpoints.checkpoint import Checkpoint
    from probes.checkpoints.lineage import other_base

    sides: list[Any] = []
    for supplied in inputs:
        sides += getattr(supplied, "checkpoints", ())
        sides += [getattr(supplied, side, None) for side in ("base", "tuned")]
    sentences = (other_base(side) for side in sides if isinstance(side, Checkpoint))
    return tuple(dict.fromkeys(filter(None, sentences)))


def plain(value: Any) -> Any:
    """The value as JSON keeps it: a tuple is a list; what JSON lacks (a dtype, a path) is its name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value))
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)
