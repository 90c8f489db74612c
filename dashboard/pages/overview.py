"""The first page of an audit: may it ship, and why; what was compared, not run, or does not align."""

from typing import Any

from dash import html

from dashboard.components import parts
from dashboard.pages import Content, View, page
from dashboard.state.query import link
from diagnostics.core.policy import Finding, judged
from diagnostics.report import content as view
from diagnostics.store.audit_store import Audit, Outcome

SAYS = {
    "pass": "By its policy this checkpoint may ship.",
    "warn": "It may ship once someone has looked at the warnings.",
    "fail": "By its policy this checkpoint must not ship.",
}


@page("overview", title="Overview", order=0)
def content(shown: View) -> Content:
    """Verdict and findings first, then what they rest on."""
    audit = shown.audit
    assert shown.entry is not None
    known = shown.entry.id
    return [
        band(audit),
        findings(audit, known),
        glance(audit, known),
        not_run(audit),
        unmatched(audit),
        compared(audit),
        data(audit),
        provenance(audit),
    ]


def band(audit: Audit) -> html.Header:
    """The verdict, in one look."""
    word = audit.verdict
    return html.Header(
        [
            html.H1([parts.icon(word), html.Span(word, className="word")], id="heading", tabIndex="-1"),
            html.P(says(audit), className="says"),
            html.P(view.sentence(view.count_findings(audit)), className="headline"),
            html.Div(
                [
                    html.P([swatch("tuned"), "tuned ", parts.code(audit.tuned.get("ref", ""))]),
                    html.P([swatch("base"), "base ", parts.code(audit.base.get("ref", ""))]),
                ],
                className="subject",
            ),
        ],
        className=f"verdict {word}",
    )


def says(audit: Audit) -> str:
    """What the verdict means for whoever decides."""
    if audit.failed:
        return "Do not ship on this audit: it is not whole."
    if not audit.judged:
        return "This audit cannot tell whether it may ship: nothing was judged."
    return SAYS[audit.verdict]


def swatch(name: str) -> html.Span:
    """The colour that a checkpoint has in every figure."""
    return html.Span(className=f"swatch {name}", **{"aria-hidden": "true"})


def findings(audit: Audit, known: str) -> Content:
    """What is beyond a threshold, the severest first, each with where it shows."""
    listed = [finding(audit, each, known) for each in audit.findings]
    broken = [failure(name, made) for name, made in audit.failed.items()]
    lacking = [
        html.Li([parts.code(f"{name}.{metric}"), f": {why}"])
        for name, metrics in audit.not_measured.items()
        for metric, why in metrics.items()
    ]
    vain = (
        parts.folded(f"{view.plural(len(lacking), 'rule')} could not be applied", html.Ul(lacking))
        if lacking
        else None
    )
    listed = [*listed, *broken]
    return parts.section(
        "Findings",
        html.Ol(listed, className="findings")
        if listed
        else parts.state("empty", "Nothing is beyond a threshold."),
        vain,
        parts.notes(audit.notes),
    )


def finding(audit: Audit, each: Finding, known: str) -> html.Li:
    """One finding."""
    where = link(page="analysis", audit=known, analysis=each.analysis, metric=each.metric)
    return html.Li(
        [
            parts.badge(each.severity),
            html.Div(
                [
                    html.P(each.message, className="message"),
                    html.P(
                        [
                            parts.going(each.analysis, where),
                            ": ",
                            parts.code(each.metric),
                            " is ",
                            html.Strong(view.format_number(each.value)),
                            f", {view.threshold_side(audit, each)} {view.format_number(each.threshold)}",
                        ],
                        className="measure",
                    ),
                    html.P(f"Threshold: {each.source}", className="source"),
                ]
            ),
        ],
        className=each.severity,
    )


def failure(name: str, made: Outcome) -> html.Li:
    """An analysis that should have a result, and has none."""
    text = [html.P(f"{name} gave no result", className="message"), html.P(made.reason, className="measure")]
    return html.Li([parts.badge("fail", "no result"), html.Div(text)], className="fail")


def glance(audit: Audit, known: str) -> Content:
    """Each analysis that has a result: its question, its first number, its verdict."""
    if not audit.results:
        return None
    rows = []
    for name, result in audit.results.items():
        metric = next(iter(result.metrics), None)
        said = (
            [parts.code(metric), " ", html.Strong(view.format_number(result.metrics[metric]))]
            if metric
            else view.NOTHING
        )
        worst = next((f.severity for f in audit.findings if f.analysis == name), "")
        verdict = worst or ("pass" if judged(result, audit.policy) else "")
        asked = audit.analyses[name].question or name
        to = link(page="analysis", audit=known, analysis=name)
        rows.append([parts.going(name, to), parts.badge(verdict), asked, said])
    return parts.section(
        "What was asked",
        parts.table(("analysis", "verdict", "question", "first number"), rows, label="Analyses"),
    )


def not_run(audit: Audit) -> Content:
    """What was skipped, and what would run it; what nobody asked for takes one line."""
    lacking = {
        name: made for name, made in audit.analyses.items() if made.result is None and made.status != "failed"
    }
    if not lacking:
        return None
    rows = [[parts.code(name), made.question, made.reason] for name, made in lacking.items() if made.question]
    unasked: dict[str, list[str]] = {}
    for name, made in lacking.items():
        if not made.question:
            unasked.setdefault(made.reason or view.NOTHING, []).append(name)
    rows += [["not asked", parts.code(", ".join(names)), reason] for reason, names in unasked.items()]
    heads = ("analysis", "question", "what would run it, or why not")
    return parts.section("Not run", parts.table(heads, rows, label="Analyses without a result"))


def unmatched(audit: Audit) -> Content:
    """The tensors that do not align."""
    if not audit.unmatched:
        return None
    count = len(audit.unmatched)
    rows = [
        [
            parts.code(each["tensor"]),
            shape(each.get("base_shape")),
            shape(each.get("tuned_shape")),
            each["reason"],
        ]
        for each in audit.unmatched[: view.ROWS]
    ]
    listed = parts.table(("tensor", "base shape", "tuned shape", "reason"), rows, label="Unmatched tensors")
    verb = "does not align, and has" if count == 1 else "do not align, and have"
    more = f" The first {view.ROWS} are listed; audit.json lists all." if count > view.ROWS else ""
    return parts.section(
        "What is wrong with the inputs",
        html.P(f"{view.plural(count, 'tensor')} {verb} no part in any number here.{more}"),
        parts.folded("Which, and why", listed, opened=count <= view.HEAD),
        name="unmatched",
    )


def shape(sizes: Any) -> str:
    """A shape, or a dash where there is no tensor."""
    return " × ".join(map(str, sizes)) if sizes else view.NOTHING


def compared(audit: Audit) -> Content:
    """The two checkpoints."""
    return parts.section(
        "What was compared",
        html.Div([side("base", audit.base), side("tuned", audit.tuned)], className="cards"),
        name="compared",
    )


def side(name: str, about: Any) -> html.Article:
    """One checkpoint."""
    adapter = {f"adapter {k}": v for k, v in (about.get("adapter") or {}).items() if v not in (None, {}, [])}
    facts = {
        key: about.get(key)
        for key in ("kind", "architecture", "parameters", "dtype")
        if about.get(key) is not None
    }
    return html.Article(
        [
            html.H3([swatch(name), name]),
            html.P(parts.code(about.get("ref", "")), className="ref"),
            parts.pairs({**facts, **adapter, "fingerprint": parts.short(about.get("fingerprint"))}),
        ],
        className=f"card {name}",
    )


def data(audit: Audit) -> Content:
    """The rows of text, by role."""
    rows = [
        [
            role,
            [f"{each['name']}: " if each.get("name") else "", parts.code(each.get("ref", ""))],
            view.format_number(each.get("rows")),
            parts.short(each.get("fingerprint")),
        ]
        for role, given in audit.data.items()
        for each in given
    ]
    if not rows:
        return parts.section("Data", html.P("None: only the weights were read.", className="empty"))
    heads = ("role", "rows of text", "rows", "fingerprint")
    return parts.section("Data", parts.table(heads, rows, label="Data", numeric=[2]))


def provenance(audit: Audit) -> Content:
    """How it came about."""
    kept = f" Results of earlier runs are kept in audit.json: {', '.join(audit.kept)}." if audit.kept else ""
    return parts.section(
        "Provenance",
        html.P(
            f"Made by tunescope {audit.tunescope}, begun {audit.created}. "
            f"Judged by: {audit.policy.origin}.{kept}"
        ),
        parts.folded("Environment and options", parts.pairs(audit.environment), parts.pairs(audit.options)),
    )
