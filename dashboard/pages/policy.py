"""Other thresholds tried on an audit: verdict and findings follow at once, and a file saves the policy."""

from typing import Any

import dash_mantine_components as dmc
from dash import ALL, Dash, Input, Output, State, dcc, html, no_update

from dashboard.components import choose, parts
from dashboard.pages.overview import finding_list
from dashboard.pages.page import Content, Page
from dashboard.state.query import Query, link
from dashboard.state.trial import STEPS, Trial, changes, key, toml, trial
from dashboard.state.view import Site, View
from diagnostics.core.policy import scale, unjudged
from diagnostics.report import content
from diagnostics.store.audit_store import Audit

RULES = {"role": "rule", "analysis": ALL, "metric": ALL}


def callbacks(app: Dash, site: Site) -> None:
    """Let verdict and findings follow the thresholds in the address."""

    @app.callback(
        [Output(part, "children") for part in ("trial", "trial-findings", RULES)],
        Input("url", "search"),
        State(RULES, "id"),
    )
    def update(search: str, rules: list[dict[str, str]]) -> Content:
        view = site.view(search)
        if view.query.value("page") != "policy" or view.readable_audit is None:
            return no_update, no_update, [no_update] * len(rules)
        tried = trial(view.audit, view.query, view.audit_id)
        states = [rule_state(tried, rule["analysis"], rule["metric"]) for rule in rules]
        return verdict(view.audit, tried), findings(tried, view.audit_id), states

    @app.callback(
        Output("policy-file", "data"),
        Input("policy-save", "n_clicks"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def save(clicks: int | None, search: str) -> Content:
        view = site.view(search)
        if not clicks or view.readable_audit is None:
            return no_update
        policy = trial(view.audit, view.query, view.audit_id).audit.policy
        return dcc.send_string(toml(policy, view.audit_id)[0], "policy.toml")


def layout(view: View) -> Content:
    """The outcome on top, then a control for each threshold."""
    audit, query = view.audit, view.query
    lead = "Change a threshold to see the verdict that it would give. The audit itself does not change."
    head = parts.heading("Try a policy", eyebrow=view.audit_id, lead=lead)
    if not audit.results:
        return [head, parts.state("empty", "This audit has no number to judge.")]
    without_rule = [
        f"{name}.{metric}"
        for name, result in audit.results.items()
        for metric in result.metrics
        if metric not in audit.policy.rules.get(name, {})
    ]
    unchanged = link(page="policy", audit=view.audit_id)
    tools = [
        dmc.Button("Download policy.toml", id="policy-save", size="sm"),
        parts.going("Reset to the audit's policy", unchanged, className="reset"),
        dcc.Download(id="policy-file"),
    ]
    look = {"placeholder": "metrics without a threshold", "searchable": True, "limit": 60}
    also = choose.multi_select(query, "also", "Add a rule", without_rule, **look)
    bar = parts.filters("Policy", also, html.Div(tools, className="policy-tools"))
    bar.children.insert(0, html.Div(id="trial", role="status", **{"aria-live": "polite"}))
    tried = trial(audit, query, view.audit_id)
    return [
        head,
        bar,
        parts.section("Findings", html.Div(id="trial-findings")),
        *(rule_section(tried, query, name) for name in audit.results),
    ]


def rule_section(tried: Trial, query: Query, name: str) -> Content:
    """The rules of one analysis, and those added in the address."""
    measured, also = tried.audit.results[name].metrics, query.many("also")
    rules = list(tried.audit.policy.rules.get(name, {}))
    metrics = rules + [m for m in measured if f"{name}.{m}" in also and m not in rules]
    if not metrics:
        return None
    rows = [rule_row(tried, query, name, metric) for metric in metrics]
    heads = ("metric", "value", "verdict", "bad side", "warn", "fail")
    table = parts.table(heads, rows, label=f"Thresholds of {name}", numeric=[1])
    return parts.section(name, table, name=f"rules-{name}")


def rule_row(tried: Trial, query: Query, name: str, metric: str) -> list[Content]:
    """One rule: its value, its verdict, and its thresholds as controls."""
    result = tried.audit.results[name]
    rule = tried.rule(name, metric)
    before = tried.changed.get((name, metric), rule)  # what the controls return to
    conditions = []
    if rule.per:
        parameters = result.parameters
        unit = f" = {content.format_number(parameters[rule.per])}" if rule.per in parameters else ""
        conditions.append(f"thresholds per {rule.per}{unit}")
    if rule.when:
        conditions.append(f"only with {rule.when}")
    label: Any = {"aria-label": f"Which side of the thresholds of {metric} is bad"}
    bad = "below" if before.below else "above"
    side = choose.select(query, key("side", name, metric), "", ["above", "below"], bad, w=92, **label)
    thresholds = []
    for step in STEPS:
        look = {"placeholder": "none", "w": 96, "aria-label": f"{step} threshold of {metric}"}
        thresholds.append(choose.number(query, key(step, name, metric), getattr(before, step), **look))
    title = [parts.code(metric), html.Span("; ".join(conditions), className="source")]
    value = content.format_number(result.metrics.get(metric))
    state = html.Div(rule_state(tried, name, metric), id={"role": "rule", "analysis": name, "metric": metric})
    return [title, value, state, side, *thresholds]


def rule_state(tried: Trial, name: str, metric: str) -> Content:
    """The verdict of one rule, or why it gives none."""
    result = tried.audit.results.get(name)
    if result is None:
        return None
    if error := tried.errors.get((name, metric)):
        return html.Span(error, className="trouble-text", role="alert")
    rule = tried.rule(name, metric)
    facts = {**result.parameters, **result.metrics}
    changed = html.Span("changed", className="changed") if (name, metric) in tried.changed else None
    if rule.off:
        reason = "no threshold"
    elif rule.when and not facts.get(rule.when):
        reason = f"does not apply: {rule.when} is {content.format_number(facts.get(rule.when))}"
    else:
        reason = unjudged(result, metric, rule)
    if reason:
        return [html.Span(reason, className="empty"), changed]
    factor = scale(result, rule)
    beyond = rule.beyond(result.metrics[metric], factor)
    scaled = f" {content.threshold_text(rule, factor)}" if rule.per else ""
    return [parts.badge(beyond[0] if beyond else "pass"), html.Span(scaled, className="source"), changed]


def verdict(audit: Audit, tried: Trial) -> Content:
    """The verdict under the tried thresholds, and how the findings change."""
    before, after = (
        {f"{finding.analysis}.{finding.metric}": finding.severity for finding in findings}
        for findings in (audit.findings, tried.audit.findings)
    )
    moved = [f"new: {name} ({after[name]})" for name in after if name not in before]
    moved += [f"gone: {name}" for name in before if name not in after]
    stayed = [name for name in after if name in before and before[name] != after[name]]
    moved += [f"{name}: {before[name]} becomes {after[name]}" for name in stayed]
    now, recorded = tried.audit.verdict, audit.verdict
    if not tried.changed:
        sentence = f"The audit's policy ({audit.policy.origin}): {recorded}."
    elif now == recorded:
        sentence = f"The verdict stays {now}."
    else:
        sentence = f"The verdict becomes {now}; the audit's policy gives {recorded}."
    outcome = [parts.badge(now), html.Strong(sentence, className="outcome")]
    failed = ", ".join(tried.audit.failed)
    incomplete = f"The verdict stays fail whatever the thresholds: {failed} gave no result."
    remarks = [parts.source("; ".join(moved)), parts.source(failed and incomplete)]
    return [html.P(outcome, className="outcome-line"), *remarks]


def findings(tried: Trial, audit_id: str) -> Content:
    """The findings under the tried thresholds, and the changed rules as TOML."""
    items = finding_list(tried.audit, audit_id)
    if not tried.changed:
        return items
    title = f"{content.plural(len(tried.changed), 'changed rule')}, as TOML"
    return [items, parts.folded(title, html.Pre(changes(tried)))]


PAGE = Page(
    "policy", "Try a policy", "audit", layout, identity=("also",),
    linked=lambda view: bool(view.audit.results), callbacks=callbacks,
)  # fmt: skip
