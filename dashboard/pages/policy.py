"""Thresholds tried on an audit: the verdict and the findings follow at once, and a file takes them along."""

from collections.abc import Iterable
from typing import Any

import dash_mantine_components as dmc
from dash import ALL, ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update

from dashboard.components import choose, parts
from dashboard.pages import Content, View, page
from dashboard.pages.overview import finding
from dashboard.state.audit_library import AuditLibrary
from dashboard.state.query import Query, link, parse
from dashboard.state.trial import OFF, STEPS, Trial, changes, key, toml, trial
from diagnostics.core.policy import Rule, scale, unjudged
from diagnostics.report import content as view
from diagnostics.store.audit_store import Audit

EVERY = {"role": "threshold", "key": ALL, "default": ALL}
STATES = {"role": "rule", "analysis": ALL, "metric": ALL}


def callbacks(app: Dash, shelf: AuditLibrary, allowed: dict[str, Any]) -> None:
    """Let verdict and findings follow the thresholds, and the thresholds the address."""
    app.clientside_callback(
        ClientsideFunction("tunescopePolicy", "tried"), Input(EVERY, "value"), prevent_initial_call=True
    )
    app.clientside_callback(
        ClientsideFunction("tunescopePolicy", "restored"),
        Input("url", "search"),
        State(EVERY, "id"),
        State(EVERY, "value"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("trial", "children"),
        Output("trial-findings", "children"),
        Output(STATES, "children"),
        Input("url", "search"),
        State(STATES, "id"),
    )
    def follow(search: str, known: list[dict[str, str]]) -> Any:
        query = parse(search)
        tried = tried_by(shelf, query)
        if query.one("page") != "policy" or tried is None:
            return no_update, no_update, [no_update] * len(known)
        rules = [state_of(tried, each["analysis"], each["metric"]) for each in known]
        return *outcome(shelf, tried, query), rules

    @app.callback(
        Output("policy-file", "data"),
        Input("policy-save", "n_clicks"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def save(clicks: int | None, search: str) -> Any:
        query = parse(search)
        tried = tried_by(shelf, query) if clicks else None
        if tried is None:
            return no_update
        return dcc.send_string(toml(tried.audit.policy, called(shelf, query))[0], "policy.toml")


def tried_by(shelf: AuditLibrary, query: Query) -> Trial | None:
    """The audit of an address under its thresholds."""
    entry = shelf.meant(query)
    audit = entry.audit if entry else None
    return trial(audit, query, entry.id) if entry and audit else None


def called(shelf: AuditLibrary, query: Query) -> str:
    """The id of the audit that an address means."""
    entry = shelf.meant(query)
    return entry.id if entry else ""


@page(
    "policy",
    title="Try a policy",
    order=30,
    identity=("also",),
    linked=lambda shown: bool(shown.audit.results),
    callbacks=callbacks,
)
def content(shown: View) -> Content:
    """Thresholds as controls, under what they lead to."""
    audit, query = shown.audit, shown.query
    assert shown.entry is not None
    known = shown.entry.id
    head = parts.heading(
        "Try a policy",
        eyebrow=known,
        lead="Change a threshold and see what the verdict would be. The audit itself stays as it is.",
    )
    if not audit.results:
        return [head, parts.state("empty", "This audit has no number that a threshold could judge.")]
    tried = trial(audit, query, known)
    others = [f"{name}.{metric}" for name, metric in unruled(audit)]
    controls = [
        choose.many(
            query,
            "also",
            "Judge also",
            others,
            placeholder="numbers without a threshold",
            searchable=True,
            limit=60,
        ),
        html.Div(
            [
                dmc.Button("Download policy.toml", id="policy-save", size="sm"),
                parts.going(
                    "Back to the audit's own",
                    link(page="policy", audit=known),
                    className="reset",
                ),
                dcc.Download(id="policy-file"),
            ],
            className="policy-tools",
        ),
    ]
    sections = [section(tried, query, name) for name in audit.results]
    return [
        head,
        html.Div(
            [
                html.Div(id="trial", role="status", **{"aria-live": "polite"}),
                html.Div(controls, className="controls"),
            ],
            className="filters trial",
        ),
        parts.section("Findings", html.Div(id="trial-findings"), name="findings"),
        *[each for each in sections if each],
    ]


def unruled(audit: Audit) -> list[tuple[str, str]]:
    """The numbers of an audit that its policy has no rule for."""
    return [
        (name, metric)
        for name, result in audit.results.items()
        for metric in result.metrics
        if metric not in audit.policy.rules.get(name, {})
    ]


def section(tried: Trial, query: Query, name: str) -> Content:
    """The rules of one analysis."""
    also = set(query.many("also"))
    own = tried.audit.policy.rules.get(name, {})
    metrics = [
        *own,
        *(
            metric
            for metric in tried.audit.results[name].metrics
            if metric not in own and f"{name}.{metric}" in also
        ),
    ]
    if not metrics:
        return None
    rows = [row(tried, query, name, metric) for metric in metrics]
    heads = ("metric", "value here", "judged", "bad when", "warn", "fail")
    return parts.section(
        name, parts.table(heads, rows, label=f"Thresholds of {name}", numeric=[1]), name=f"rules-{name}"
    )


def row(tried: Trial, query: Query, name: str, metric: str) -> list[Content]:
    """One rule: what it judges, its thresholds as controls, what it says."""
    result = tried.audit.results[name]
    made = tried.audit.policy.rules.get(name, {}).get(metric, Rule())
    condition = [
        f"thresholds per {made.per}"
        + (
            f", which is {view.format_number(result.parameters.get(made.per))}"
            if made.per in result.parameters
            else ""
        )
        if made.per
        else "",
        f"only where {made.when}" if made.when else "",
    ]
    sided = choose.one(
        query,
        key("side", name, metric),
        "",
        ["above", "below"],
        default="below" if before(tried, name, metric).below else "above",
        w=92,
        **{"aria-label": f"Which side of the thresholds of {metric} is bad"},
    )
    return [
        [parts.code(metric), html.Span("; ".join(filter(None, condition)), className="source")],
        view.format_number(result.metrics.get(metric)),
        html.Div(state_of(tried, name, metric), id={"role": "rule", "analysis": name, "metric": metric}),
        sided,
        *[threshold(tried, query, name, metric, step) for step in STEPS],
    ]


def before(tried: Trial, name: str, metric: str) -> Rule:
    """A rule as the audit's own policy has it: what the controls return to."""
    made = tried.audit.policy.rules.get(name, {}).get(metric, Rule())
    return tried.own.get((name, metric), made)


def threshold(tried: Trial, query: Query, name: str, metric: str, step: str) -> dmc.NumberInput:
    """A control for one threshold; empty means that there is none."""
    own = getattr(before(tried, name, metric), step)
    default = OFF if own is None else repr(own)
    asked = query.one(key(step, name, metric), default)
    return dmc.NumberInput(
        id={"role": "threshold", "key": key(step, name, metric), "default": default},
        value="" if asked == OFF else number(asked),
        placeholder="never",
        size="sm",
        w=96,
        hideControls=True,
        debounce=200,
        **{"aria-label": f"{step} threshold of {metric}"},
    )


def number(asked: str) -> float | str:
    """A threshold as a control shows it; one that makes no sense is shown as it came."""
    try:
        return float(asked)
    except ValueError:
        return ""


def state_of(tried: Trial, name: str, metric: str) -> Content:
    """What a rule says now."""
    result = tried.audit.results.get(name)
    made = tried.audit.policy.rules.get(name, {}).get(metric, Rule())
    trouble = tried.troubles.get((name, metric))
    if result is None:
        return None
    if trouble:
        return html.Span(trouble, className="trouble-text", role="alert")
    facts = {**result.parameters, **result.metrics}
    if made.off:
        text = "no threshold"
    elif made.when and not facts.get(made.when):
        text = f"does not apply: {made.when} is {view.format_number(facts.get(made.when))}"
    else:
        text = unjudged(result, metric, made)
    changed = html.Span("changed", className="changed") if (name, metric) in tried.own else None
    if text:
        return [html.Span(text, className="empty"), changed]
    factor = scale(result, made)
    beyond = made.beyond(result.metrics[metric], factor)
    said = f" {view.threshold_text(made, factor)}" if made.per else ""
    return [parts.badge(beyond[0] if beyond else "pass"), html.Span(said, className="source"), changed]


def outcome(shelf: AuditLibrary, tried: Trial, query: Query) -> tuple[Content, Content]:
    """The verdict, and the findings, under the thresholds as they are now."""
    entry = shelf.meant(query)
    audit = entry.audit if entry else None
    assert entry is not None
    assert audit is not None
    now = tried.audit
    old = {(f.analysis, f.metric): f.severity for f in audit.findings}
    new = {(f.analysis, f.metric): f.severity for f in now.findings}
    moved = [
        *(f"new: {one}.{two} ({new[one, two]})" for one, two in new if (one, two) not in old),
        *(f"gone: {one}.{two}" for one, two in old if (one, two) not in new),
        *(
            f"{one}.{two}: {old[one, two]} becomes {severity}"
            for (one, two), severity in new.items()
            if (one, two) in old and old[one, two] != severity
        ),
    ]
    told = [
        html.P(
            [
                parts.badge(now.verdict),
                html.Strong(sentence(audit, now, len(tried.own)), className="outcome"),
            ],
            className="outcome-line",
        ),
        html.P("; ".join(moved), className="source") if moved else None,
        failed(now.failed),
    ]
    listed = [
        html.Ol([finding(now, each, entry.id) for each in now.findings], className="findings")
        if now.findings
        else parts.state("empty", "Nothing is beyond a threshold."),
        parts.folded(f"{view.plural(len(tried.own), 'rule')} changed, as TOML", html.Pre(changes(tried)))
        if tried.own
        else None,
    ]
    return told, listed


def sentence(before: Audit, now: Audit, changed: int) -> str:
    """The verdict, beside the audit's own."""
    if not changed:
        return f"The audit's own policy ({before.policy.origin}): {before.verdict}."
    if now.verdict == before.verdict:
        return f"The verdict stays {now.verdict}."
    return f"The verdict becomes {now.verdict}; by the audit's own policy it is {before.verdict}."


def failed(names: Iterable[str]) -> Content:
    """That no threshold mends an analysis without a result."""
    listed = ", ".join(names)
    return (
        html.P(f"No threshold changes that {listed} gave no result.", className="source") if listed else None
    )
