"""The audit: runs the analyses whose inputs are there, one by one, and keeps each as soon as it is done."""

import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics import engines, machine
from diagnostics.analysis import EXECUTION, Analysis, NotApplicableError, find, installed
from diagnostics.disk import CannotWriteError
from diagnostics.inputs import OPTIONS, ROLES, open_roles
from diagnostics.policy import Policy, default_policy, load_policy
from diagnostics.provenance import described, digest, key, one_line
from diagnostics.store import MEASUREMENTS, Audit, Outcome, Store

if TYPE_CHECKING:
    from diagnostics.factor_cache import FactorCache
    from probes import CheckpointPair
    from probes.series import CheckpointSeries

UNFINISHED = "not finished; run the same command again to go on"
Progress = Callable[[str, int, int, str], None]


def audit(
    base: Any,
    tuned: Any,
    *,
    out: str | Path = "audit",
    only: Collection[str] = (),
    skip: Collection[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    policy: Policy | str | Path | None = None,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
    engine: str = "local",
    cache: "FactorCache | str | Path | None" = None,
    fresh: bool = False,
    progress: Progress | None = None,
    task: Iterable[str | Path] = (),
    keep: Iterable[str | Path] = (),
    guard: Iterable[str | Path] = (),
    ood: Iterable[str | Path] = (),
    train: Iterable[str | Path] = (),
    limit: int | None = None,
    chat_template: bool = False,
    approximate: bool = False,
    trust_remote_code: bool = False,
    series: "CheckpointSeries | None" = None,
    aside: Mapping[str, str] | None = None,
) -> Audit:
    """Measure what tuning did, judge it, and write the audit and its report into a directory.

    Each finished analysis is written at once; the same call continues after a kill. A result is used again
    only when the checkpoints, rows, parameters, versions and sources that it depends on are the same.

    Args:
        base, tuned: whatever `probes.open_checkpoint` opens.
        out: the audit's directory, made if need be.
        only, skip: names of analyses to run, or to leave out; all that have their inputs otherwise.
        settings: parameters by analysis, in place of their defaults.
        policy: thresholds, or a TOML file of them; the default policy otherwise.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: of the arithmetic, for the analyses that take one; each one's default otherwise.
        seed: for the analyses that take one.
        engine: where work that splits runs: `local`, `local:N`, `dask://HOST:PORT`, `ray://HOST:PORT`.
        cache: a directory that keeps what was made of a base for the next model tuned from it; changes no
            result.
        fresh: forget what an earlier run left in `out`.
        progress: called with (analysis, done, total, what is being done).
        task, keep, guard, ood, train: files of rows by role; `NAME=F` names one of `ood`.
        limit: read the first so many rows of each file only.
        chat_template, approximate, trust_remote_code: for the analyses that take them: write rows as a user's
            message, let tokenizers differ, run code that a repository brings.
        series: the run that base and tuned are the ends of, for the analyses that look at all of it;
            otherwise these two are all of it.
        aside: analyses that are left out, and why.

    Raises:
        ValueError, LookupError: the input is wrong; nothing has been run or written.
        OSError: `out` cannot be written; what was finished is kept.
        RuntimeError: the report could not be drawn; all else is written.
    """
    reasons = {name: why for name, why in (aside or {}).items() if name in chosen(only, skip)}
    names = [name for name in chosen(only, skip) if name not in reasons]
    rules = policy if isinstance(policy, Policy) else load_policy(policy) if policy else default_policy()
    where = machine.device(device)
    common = {"dtype": machine.dtype(dtype), "seed": seed}
    asked = {
        "chat_template": chat_template,
        "approximate": approximate,
        "trust_remote_code": trust_remote_code,
    }
    common |= {name: True for name, wanted in asked.items() if wanted}
    rows = open_roles({"task": task, "keep": keep, "guard": guard, "ood": ood, "train": train}, limit=limit)
    plan = {name: parameters(find(name), settings or {}, common) for name in names}
    check_settings(settings or {})
    lacking = {name: missing(find(name), {"pair", "series", *rows}) for name in names}
    if all(lacking.values()):
        lines = [f"{name} {reason}" for name, reason in lacking.items()]
        raise ValueError(f"nothing to run: {'; '.join(lines) or 'every analysis is left out'}")
    store = Store(out)
    from diagnostics.factor_cache import FactorCache
    from probes import CheckpointPair
    from probes.series import CheckpointSeries

    pair = CheckpointPair(base, tuned)
    if series is None:
        series = CheckpointSeries([pair.base, pair.tuned], steps=("base", "tuned"), complete=True)
    with engines.engine(engine, where), store:
        return run(
            store,
            pair,
            plan,
            supplied={"pair": pair, "series": series, **rows},
            skipped={
                **{name: not_chosen(name, only) for name in installed() if name not in names},
                **reasons,
                **{name: reason for name, reason in lacking.items() if reason},
            },
            policy=rules,
            device=where,
            cache=FactorCache.at(cache),
            fresh=fresh,
            progress=progress,
            options={"only": only, "skip": skip, "settings": settings or {}, "engine": engine, **common},
            notes=(*of_run(series), *unread(rows, names), *of_adapters(pair)),
        )


def run(
    store: Store,
    pair: "CheckpointPair",
    plan: Mapping[str, Mapping[str, Any]],
    *,
    supplied: Mapping[str, Any],
    skipped: Mapping[str, str],
    policy: Policy,
    device: str,
    cache: "FactorCache | None",
    fresh: bool,
    progress: Progress | None,
    options: Mapping[str, Any],
    notes: tuple[str, ...],
) -> Audit:
    """The audit once its inputs are known to be right and its directory is ours."""
    earlier = None if fresh else store.earlier()
    if fresh:
        store.clear()
    stamps = {side: digest(getattr(pair, side).stamp()) for side in ("base", "tuned")}
    from probes.series import TooShortError

    series: CheckpointSeries = supplied["series"]
    run_stamps = {**stamps, "series": digest(*series.stamps, *map(str, series.labels))}
    rows = {role: [made.describe() for made in supplied[role]] for role in ROLES if role in supplied}
    keys = {
        name: key(find(name), used, run_stamps if "series" in find(name).inputs else stamps, rows)
        for name, used in plan.items()
        if name not in skipped
    }
    same = earlier is not None and all(stamps[s] == getattr(earlier, s).get("stamp") for s in stamps)
    known = [*earlier.kept.items(), *earlier.analyses.items()] if earlier is not None and same else []
    done = {name: made for name, made in known if made.result is not None}

    outcomes = {
        name: Outcome(status="skipped", reason=reason, **(about(name) if name in plan else {}))
        for name, reason in skipped.items()
    }
    for name, expected in keys.items():
        if name in done and done[name].key == expected:
            outcomes[name] = replace(done[name], reused=True)
        else:
            outcomes[name] = Outcome(status="failed", fault="unfinished", reason=UNFINISHED, **about(name))
    state = Audit(
        base={"ref": pair.base.ref, "kind": pair.base.kind, "fingerprint": None, "stamp": stamps["base"]},
        tuned={"ref": pair.tuned.ref, "kind": pair.tuned.kind, "fingerprint": None, "stamp": stamps["tuned"]},
        data=rows,
        environment={**machine.environment(device), "seed": options["seed"]},
        options=options,
        policy=policy,
        analyses=dict(sorted(outcomes.items())),
        kept={name: made for name, made in done.items() if name not in keys},
        unmatched=tuple(asdict(each) for each in pair.unmatched),
        notes=notes,
        created=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        tunescope=version("tunescope"),
        path=store.out,
    )
    store.begin(state)
    for name in [name for name in keys if outcomes[name].result is None]:
        context = key(
            find(name), plan[name], {}, rows
        )  # what was measured on a checkpoint outlives the series
        given = {**supplied, "series": series.within(context, store.out / MEASUREMENTS)}
        unless_asked = () if name in options["only"] else (NotApplicableError, TooShortError)
        outcome = run_one(
            store, find(name), plan[name], given, device=device, cache=cache, progress=progress,
            leave_out=unless_asked,
        )  # fmt: skip
        state = replace(state, analyses={**state.analyses, name: replace(outcome, key=keys[name])})
        store.write(state)
    base, tuned, trouble = described(pair, earlier if same else None)
    state = replace(
        state, base={**state.base, **base}, tuned={**state.tuned, **tuned}, notes=(*state.notes, *trouble)
    )
    store.write(state)
    write_report(store, state)
    return state


def run_one(
    store: Store,
    record: Analysis,
    used: Mapping[str, Any],
    supplied: Mapping[str, Any],
    *,
    device: str,
    cache: "FactorCache | None" = None,
    progress: Progress | None,
    leave_out: tuple[type[Exception], ...] = (),
) -> Outcome:
    """Run one analysis and write its tables and masks; whatever goes wrong in it stays in it.

    Args:
        leave_out: errors that say that there is nothing to measure: it is skipped then, not failed.
    """
    shown = partial(progress, record.name) if progress else None
    place = {"device": device, "cache": cache, "progress": shown}
    inputs = {
        name: {rows.name: rows.task for rows in supplied[name]} if name in ROLES else supplied[name]
        for name in (*record.inputs, *record.optional)
        if name in supplied
    }
    memory = machine.PeakMemory()
    memory.start()
    began = time.perf_counter()
    try:
        result = record.function(
            **inputs, **used, **{name: value for name, value in place.items() if name in record.parameters}
        )
        seconds = time.perf_counter() - began
        outcome = Outcome(status="ok", result=result)
        store.write_result(record.name, result)
    except CannotWriteError:
        raise
    except Exception as error:
        seconds = time.perf_counter() - began
        if isinstance(error, leave_out):
            outcome = Outcome(status="skipped", reason=one_line(error))
        else:
            outcome = refused(error) if says_why(error) else crashed(store, record.name, error)
    return replace(
        outcome,
        seconds=round(seconds, 3),
        peak_rss_mb=memory.megabytes(),
        device=device,
        **about(record.name),
    )


def says_why(error: Exception) -> bool:
    """Whether an error tells a person that the input is wrong: a ValueError or LookupError of ours.

    Python's own kinds of these, KeyError and UnicodeError among them, and other packages' mean a fault here.
    """
    kind = type(error)
    ours = kind.__module__.partition(".")[0] in ("probes", "diagnostics")
    return kind in (ValueError, LookupError) or (ours and issubclass(kind, ValueError | LookupError))


def refused(error: Exception) -> Outcome:
    """What becomes of an analysis that finds its input wrong."""
    return Outcome(status="failed", fault="input", reason=one_line(error))


def crashed(store: Store, name: str, error: Exception) -> Outcome:
    """What becomes of an analysis that breaks: one line here, the traceback in audit.log."""
    text = "".join(traceback.format_exception(error))
    store.log(f"{datetime.now(UTC).isoformat(timespec='seconds')} {name}\n{text}")
    return Outcome(
        status="failed",
        fault="crash",
        reason=f"{type(error).__name__}: {one_line(error)} (traceback in audit.log)",
    )


def write_report(store: Store, state: Audit) -> None:
    """Write report.html.

    Raises:
        RuntimeError: it could not be drawn.
    """
    from diagnostics.report import write_html

    try:
        write_html(state, store.out / "report.html")
    except CannotWriteError:
        raise
    except Exception as error:
        store.log("report.html\n" + "".join(traceback.format_exception(error)))
        raise RuntimeError(
            f"{store.out / 'report.html'} could not be drawn: {type(error).__name__}: {one_line(error)}; "
            "audit.json and the tables are complete, the traceback is in audit.log"
        ) from error


def chosen(only: Collection[str], skip: Collection[str]) -> list[str]:
    """The names of the analyses that are asked for.

    Raises:
        LookupError: one is not installed; the message lists those that are.
    """
    known = installed()
    for option, names in (("--only", only), ("--skip", skip)):
        for name in names:
            if name not in known:
                raise LookupError(f"{option}: unknown analysis {name!r}; known: {', '.join(known)}")
    return [name for name in known if (not only or name in only) and name not in skip]


def not_chosen(name: str, only: Collection[str]) -> str:
    """Why an analysis is not run although it could be."""
    return f"not asked for: --only {','.join(only)}" if only and name not in only else "left out by --skip"


def missing(record: Analysis, supplied: Collection[str]) -> str:
    """Which option would let an analysis run; empty when nothing is missing."""
    lacking = [name for name in record.inputs if name not in supplied]
    if any(name not in OPTIONS for name in lacking):
        unknown = next(name for name in lacking if name not in OPTIONS)
        return f"needs {unknown!r}, which this tunescope cannot supply"
    return "needs " + " and ".join(OPTIONS[name] for name in lacking) if lacking else ""


def unread(rows: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    """Notes on the roles that were given and that nothing reads."""
    records = []
    for name in installed() if rows else ():
        with suppress(LookupError):  # a broken package reads nothing; asked for by name, it is refused
            records.append(find(name))
    notes = []
    for role in rows:
        readers = {record.name for record in records if role in (*record.inputs, *record.optional)}
        if not readers:
            notes.append(
                f"no installed analysis reads --{role}; the file is recorded and has no other effect"
            )
        elif not readers & set(names):
            notes.append(f"none of the analyses asked for reads --{role}; {', '.join(sorted(readers))} would")
    return tuple(notes)


def of_run(series: "CheckpointSeries") -> tuple[str, ...]:
    """Which checkpoints a run has, where there are others than the two ends."""
    if len(series) < 3:
        return ()
    return (f"{len(series)} checkpoints of one run: {', '.join(series.labels)}",)


def of_adapters(pair: "CheckpointPair") -> tuple[str, ...]:
    """Notes on the adapters among the checkpoints: how they are read, and whether they name another base."""
    notes = []
    for side in (pair.base, pair.tuned):
        facts = side.adapter or {}
        notes += [f"{side.ref}: {note}" for note in facts.get("notes", ())]
        named, base = facts.get("base"), side.base
        # Directories are moved and hub ids downloaded: the last part of the name is what stays.
        if named and base and base.directory and Path(named).name not in str(base.directory.resolve()):
            notes.append(
                f"{side.ref} was trained on {named!r} and is applied to {base.ref}: is that the same model?"
            )
    return tuple(dict.fromkeys(notes))


def check_settings(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse settings of what is not installed.

    Raises:
        LookupError: the message lists what is.
    """
    for name in settings:
        if name not in installed():
            raise LookupError(f"--set {name}.…: unknown analysis {name!r}; known: {', '.join(installed())}")


def parameters(
    record: Analysis, settings: Mapping[str, Mapping[str, Any]], common: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters that an analysis will run with, defaults included, without those of its execution.

    Raises:
        LookupError: a setting that it does not have; the message lists those that it has.
    """
    own = {name: p.default for name, p in record.parameters.items() if name not in EXECUTION}
    given = settings.get(record.name, {})
    for name in given:
        if name not in own:
            raise LookupError(f"{record.name} has no parameter {name!r}; it has: {', '.join(own)}")
    shared = {name: value for name, value in common.items() if name in own and value is not None}
    return {**own, **shared, **given}


def about(name: str) -> dict[str, Any]:
    """What an audit keeps of the registry, so that it reads without the package."""
    record = find(name)
    return {"question": record.question, "paper": record.paper}
