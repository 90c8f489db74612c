"""The first page of an audit: verdict and findings, then what was compared and what was not run."""

from collections.abc import Mapping, Sequence
from typing import Any

from dash import html

from dashboard.components import parts
from dashboard.pages.page import Content, Page
from dashboard.state.query import link
from dashboard.state.view import View
from diagnostics.core.policy import Finding, judged
from diagnostics.report import content
from diagnostics.store.audit_store import Audit

ADVICE = {
    "pass": "The policy allows this checkpoint to ship.",
    "warn": "Review the warnings before this checkpoint ships.",
    "fail": "The policy does not allow this checkpoint to ship.",
}


def layout(view: View) -> Content:
    """Verdict and findings first, then the evidence."""
    audit = view.audit
    checkpoints = [checkpoint("base", audit.base), checkpoint("tuned", audit.tuned)]
    return [
        band(audit),
        findings(audit, view.audit_id),
        analyses(audit, view.audit_id),
        not_run(audit),
        unmatched(audit),
        parts.section("Checkpoints", html.Div(checkpoints, className="cards")),
        data(audit),
        provenance(audit),
    ]


def band(audit: Audit) -> html.Header:
    """The verdict."""
    word, advice = audit.verdict, ADVICE[audit.verdict]
    if audit.failed:
        advice = "Do not ship on this audit: it is incomplete."
    elif not audit.judged:
        advice = "This audit cannot decide whether the checkpoint may ship: nothing was judged."
    subject = [
        html.P([swatch(name), f"{name} ", parts.code(record.get("ref", ""))])
        for name, record in (("tuned", audit.tuned), ("base", audit.base))
    ]
    lines = [
        html.H1([parts.icon(word), html.Span(word, className="word")], id="heading", tabIndex="-1"),
        html.P(advice, className="says"),
        html.P(content.sentence(content.count_findings(audit)), className="headline"),
        html.Div(subject, className="subject"),
    ]
    return html.Header(lines, className=f"verdict {word}")


def swatch(name: str) -> html.Span:
    """The colour of a checkpoint in every figure."""
    return html.Span(className=f"swatch {name}", **{"aria-hidden": "true"})


def findings(audit: Audit, audit_id: str) -> Content:
    """Every value beyond a threshold, the most severe first, with a link to its number."""
    failures = []
    for name, outcome in audit.failed.items():
        failure = html.P(f"{name} gave no result", className="message")
        text = html.Div([failure, html.P(outcome.reason, className="measure")])
        failures.append(html.Li([parts.badge("fail", "no result"), text], className="fail"))
    lacking = [
        html.Li([parts.code(f"{name}.{metric}"), f": {why}"])
        for name, metrics in audit.not_measured.items()
        for metric, why in metrics.items()
    ]
    title = f"{content.plural(len(lacking), 'rule')} could not be applied"
    folded = parts.folded(title, html.Ul(lacking)) if lacking else None
    return parts.section(
        "Findings", finding_list(audit, audit_id, failures), folded, parts.notes(audit.notes)
    )


def finding_list(audit: Audit, audit_id: str, failures: Sequence[html.Li] = ()) -> Content:
    """The findings and the failed analyses of an audit, if there are any."""
    items = [finding_item(audit, finding, audit_id) for finding in audit.findings] + [*failures]
    if not items:
        return parts.state("empty", "No value is beyond a threshold.")
    return html.Ol(items, className="findings")


def finding_item(audit: Audit, finding: Finding, audit_id: str) -> html.Li:
    """One finding."""
    number = link(page="analysis", audit=audit_id, analysis=finding.analysis, metric=finding.metric)
    value, threshold = map(content.format_number, (finding.value, finding.threshold))
    measure = [parts.going(finding.analysis, number), ": ", parts.code(finding.metric), " is "]
    measure += [html.Strong(value), f", {content.threshold_side(audit, finding)} {threshold}"]
    text = [
        html.P(finding.message, className="message"),
        html.P(measure, className="measure"),
        parts.source(f"Threshold: {finding.source}"),
    ]
    return html.Li([parts.badge(finding.severity), html.Div(text)], className=finding.severity)


def analyses(audit: Audit, audit_id: str) -> Content:
    """Each analysis with a result: its verdict, question and first number."""
    if not audit.results:
        return None
    rows = []
    for name, result in audit.results.items():
        metric = next(iter(result.metrics), None)
        number = html.Strong(content.format_number(result.metrics[metric])) if metric else None
        severity = next((finding.severity for finding in audit.findings if finding.analysis == name), "")
        badge = parts.badge(severity or ("pass" if judged(result, audit.policy) else ""))
        title = parts.going(name, link(page="analysis", audit=audit_id, analysis=name))
        first = [parts.code(metric), " ", number] if metric else content.NOTHING
        rows.append([title, badge, audit.analyses[name].question or name, first])
    heads = ("analysis", "verdict", "question", "first number")
    return parts.section("Analyses", parts.table(heads, rows, label="Analyses"))


def not_run(audit: Audit) -> Content:
    """The analyses without a result and why; those that were not requested share one line."""
    rows: list[list[Content]] = []
    not_requested: dict[str, list[str]] = {}
    for name, outcome in audit.analyses.items():
        if outcome.result is not None or outcome.status == "failed":
            continue
        if outcome.question:
            rows.append([parts.code(name), outcome.question, outcome.reason])
        else:
            not_requested.setdefault(outcome.reason or content.NOTHING, []).append(name)
    rows += [["not requested", parts.code(", ".join(names)), why] for why, names in not_requested.items()]
    heads = ("analysis", "question", "reason, or what it needs")
    table = parts.table(heads, rows, label="Analyses that were not run")
    return parts.section("Not run", table) if rows else None


def unmatched(audit: Audit) -> Content:
    """The tensors that base and tuned do not share."""
    if not audit.unmatched:
        return None
    count = len(audit.unmatched)
    rows = []
    for tensor in audit.unmatched[: content.ROWS]:
        sizes = (tensor.get("base_shape"), tensor.get("tuned_shape"))
        shapes = [" × ".join(map(str, size)) if size else content.NOTHING for size in sizes]
        rows.append([parts.code(tensor["tensor"]), *shapes, tensor["reason"]])
    heads = ("tensor", "base shape", "tuned shape", "reason")
    verb = "does not match and is" if count == 1 else "do not match and are"
    more = f" The first {content.ROWS} are listed; audit.json lists all." if count > content.ROWS else ""
    lead = html.P(f"{content.plural(count, 'tensor')} {verb} left out of every number.{more}")
    table = parts.table(heads, rows, label="Unmatched tensors")
    folded = parts.folded("Names, shapes and reasons", table, opened=count <= content.HEAD)
    return parts.section("Unmatched tensors", lead, folded, name="unmatched")


def checkpoint(name: str, record: Mapping[str, Any]) -> html.Article:
    """One checkpoint."""
    keys = ("kind", "architecture", "parameters", "dtype")
    facts = {key: record[key] for key in keys if record.get(key) is not None}
    for key, value in (record.get("adapter") or {}).items():
        if value not in (None, {}, []):
            facts[f"adapter {key}"] = value
    facts["fingerprint"] = parts.short(record.get("fingerprint"))
    ref = html.P(parts.code(record.get("ref", "")), className="ref")
    return html.Article([html.H3([swatch(name), name]), ref, parts.pairs(facts)], className=f"card {name}")


def data(audit: Audit) -> Content:
    """The files of rows, by role."""
    rows = []
    for role, file in ((role, file) for role, files in audit.data.items() for file in files):
        name = [f"{file['name']}: " if file.get("name") else "", parts.code(file.get("ref", ""))]
        count = content.format_number(file.get("rows"))
        rows.append([role, name, count, parts.short(file.get("fingerprint"))])
    if not rows:
        return parts.section("Data", html.P("No rows: only the weights were read.", className="empty"))
    heads = ("role", "file", "rows", "fingerprint")
    return parts.section("Data", parts.table(heads, rows, label="Data", numeric=[2]))


def provenance(audit: Audit) -> Content:
    """Versions, options and policy."""
    kept = f" audit.json also keeps results of earlier runs: {', '.join(audit.kept)}." if audit.kept else ""
    created = f"Created by tunescope {audit.tunescope}, started {audit.created}."
    details = (parts.pairs(audit.environment), parts.pairs(audit.options))
    folded = parts.folded("Environment and options", *details)
    return parts.section("Provenance", html.P(f"{created} Policy: {audit.policy.origin}.{kept}"), folded)


PAGE = Page("overview", "Overview", "audit", layout)
