"""The first page of an audit: verdict and findings, then what was compared and what was not run."""

from collections.abc import Mapping
from typing import Any

from dash import html

from dashboard.components import parts
from dashboard.pages.page import Content, Page
from dashboard.state.query import link
from dashboard.state.view import View
from diagnostics.core.policy import Finding, judged
from diagnostics.report import content
from diagnostics.store.audit_store import Audit, Outcome

ADVICE = {
    "pass": "The policy allows this checkpoint to ship.",
    "warn": "Review the warnings before this checkpoint ships.",
    "fail": "The policy does not allow this checkpoint to ship.",
}


def layout(view: View) -> Content:
    """Verdict and findings first, then the evidence."""
    audit = view.audit
    return [
        band(audit),
        findings(audit, view.audit_id),
        analyses(audit, view.audit_id),
        not_run(audit),
        unmatched(audit),
        parts.section(
            "Checkpoints",
            html.Div([checkpoint("base", audit.base), checkpoint("tuned", audit.tuned)], className="cards"),
        ),
        data(audit),
        provenance(audit),
    ]


def band(audit: Audit) -> html.Header:
    """The verdict."""
    word = audit.verdict
    subject = [
        html.P([swatch(name), f"{name} ", parts.code(record.get("ref", ""))])
        for name, record in (("tuned", audit.tuned), ("base", audit.base))
    ]
    return html.Header(
        [
            html.H1([parts.icon(word), html.Span(word, className="word")], id="heading", tabIndex="-1"),
            html.P(advice(audit), className="says"),
            html.P(content.sentence(content.count_findings(audit)), className="headline"),
            html.Div(subject, className="subject"),
        ],
        className=f"verdict {word}",
    )


def advice(audit: Audit) -> str:
    """What the verdict means for a release."""
    if audit.failed:
        return "Do not ship on this audit: it is incomplete."
    if not audit.judged:
        return "This audit cannot decide whether the checkpoint may ship: nothing was judged."
    return ADVICE[audit.verdict]


def swatch(name: str) -> html.Span:
    """The colour of a checkpoint in every figure."""
    return html.Span(className=f"swatch {name}", **{"aria-hidden": "true"})


def findings(audit: Audit, audit_id: str) -> Content:
    """Every value beyond a threshold, the most severe first, with a link to its number."""
    items = [finding_item(audit, finding, audit_id) for finding in audit.findings]
    items += [failure_item(name, outcome) for name, outcome in audit.failed.items()]
    lacking = [
        html.Li([parts.code(f"{name}.{metric}"), f": {why}"])
        for name, metrics in audit.not_measured.items()
        for metric, why in metrics.items()
    ]
    return parts.section(
        "Findings",
        html.Ol(items, className="findings")
        if items
        else parts.state("empty", "No value is beyond a threshold."),
        parts.folded(f"{content.plural(len(lacking), 'rule')} could not be applied", html.Ul(lacking))
        if lacking
        else None,
        parts.notes(audit.notes),
    )


def finding_item(audit: Audit, finding: Finding, audit_id: str) -> html.Li:
    """One finding."""
    number = link(page="analysis", audit=audit_id, analysis=finding.analysis, metric=finding.metric)
    measure = [
        parts.going(finding.analysis, number),
        ": ",
        parts.code(finding.metric),
        " is ",
        html.Strong(content.format_number(finding.value)),
        f", {content.threshold_side(audit, finding)} {content.format_number(finding.threshold)}",
    ]
    text = [
        html.P(finding.message, className="message"),
        html.P(measure, className="measure"),
        html.P(f"Threshold: {finding.source}", className="source"),
    ]
    return html.Li([parts.badge(finding.severity), html.Div(text)], className=finding.severity)


def failure_item(name: str, outcome: Outcome) -> html.Li:
    """An analysis that failed."""
    text = [
        html.P(f"{name} gave no result", className="message"),
        html.P(outcome.reason, className="measure"),
    ]
    return html.Li([parts.badge("fail", "no result"), html.Div(text)], className="fail")


def analyses(audit: Audit, audit_id: str) -> Content:
    """Each analysis with a result: its verdict, question and first number."""
    if not audit.results:
        return None
    rows = []
    for name, result in audit.results.items():
        metric = next(iter(result.metrics), None)
        number = html.Strong(content.format_number(result.metrics[metric])) if metric else None
        severity = next((finding.severity for finding in audit.findings if finding.analysis == name), "")
        rows.append(
            [
                parts.going(name, link(page="analysis", audit=audit_id, analysis=name)),
                parts.badge(severity or ("pass" if judged(result, audit.policy) else "")),
                audit.analyses[name].question or name,
                [parts.code(metric), " ", number] if metric else content.NOTHING,
            ]
        )
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
    rows += [
        ["not requested", parts.code(", ".join(names)), reason] for reason, names in not_requested.items()
    ]
    heads = ("analysis", "question", "reason, or what it needs")
    return (
        parts.section("Not run", parts.table(heads, rows, label="Analyses that were not run"))
        if rows
        else None
    )


def unmatched(audit: Audit) -> Content:
    """The tensors that base and tuned do not share."""
    if not audit.unmatched:
        return None
    count = len(audit.unmatched)
    rows = [
        [
            parts.code(tensor["tensor"]),
            shape(tensor.get("base_shape")),
            shape(tensor.get("tuned_shape")),
            tensor["reason"],
        ]
        for tensor in audit.unmatched[: content.ROWS]
    ]
    heads = ("tensor", "base shape", "tuned shape", "reason")
    verb = "does not match and is" if count == 1 else "do not match and are"
    more = f" The first {content.ROWS} are listed; audit.json lists all." if count > content.ROWS else ""
    return parts.section(
        "Unmatched tensors",
        html.P(f"{content.plural(count, 'tensor')} {verb} left out of every number.{more}"),
        parts.folded(
            "Names, shapes and reasons",
            parts.table(heads, rows, label="Unmatched tensors"),
            opened=count <= content.HEAD,
        ),
        name="unmatched",
    )


def shape(sizes: Any) -> str:
    """A shape; a dash where there is no tensor."""
    return " × ".join(map(str, sizes)) if sizes else content.NOTHING


def checkpoint(name: str, record: Mapping[str, Any]) -> html.Article:
    """One checkpoint."""
    keys = ("kind", "architecture", "parameters", "dtype")
    facts = {key: record[key] for key in keys if record.get(key) is not None}
    adapter = {
        f"adapter {key}": value
        for key, value in (record.get("adapter") or {}).items()
        if value not in (None, {}, [])
    }
    return html.Article(
        [
            html.H3([swatch(name), name]),
            html.P(parts.code(record.get("ref", "")), className="ref"),
            parts.pairs({**facts, **adapter, "fingerprint": parts.short(record.get("fingerprint"))}),
        ],
        className=f"card {name}",
    )


def data(audit: Audit) -> Content:
    """The files of rows, by role."""
    rows = [
        [
            role,
            [f"{file['name']}: " if file.get("name") else "", parts.code(file.get("ref", ""))],
            content.format_number(file.get("rows")),
            parts.short(file.get("fingerprint")),
        ]
        for role, files in audit.data.items()
        for file in files
    ]
    if not rows:
        return parts.section("Data", html.P("No rows: only the weights were read.", className="empty"))
    heads = ("role", "file", "rows", "fingerprint")
    return parts.section("Data", parts.table(heads, rows, label="Data", numeric=[2]))


def provenance(audit: Audit) -> Content:
    """Versions, options and policy."""
    kept = f" audit.json also keeps results of earlier runs: {', '.join(audit.kept)}." if audit.kept else ""
    return parts.section(
        "Provenance",
        html.P(
            f"Created by tunescope {audit.tunescope}, started {audit.created}. "
            f"Policy: {audit.policy.origin}.{kept}"
        ),
        parts.folded("Environment and options", parts.pairs(audit.environment), parts.pairs(audit.options)),
    )


PAGE = Page(name="overview", title="Overview", of="audit", layout=layout)
