"""The audit: runs the analyses whose inputs are there, one by one, and keeps each as soon as it is done."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.audit.plan import (
    Progress,
    about,
    adapter_notes,
    check_settings,
    missing,
    not_chosen,
    parameters,
    run_notes,
    unread_role_notes,
    usable,
)
from diagnostics.audit.step import run_one, write_report
from diagnostics.core.analysis import NotApplicableError
from diagnostics.core.inputs import ROLES, open_roles
from diagnostics.core.policy import Policy, default_policy
from diagnostics.core.policy_file import load_policy
from diagnostics.core.registry import find, installed
from diagnostics.execution import engines, environment
from diagnostics.store.audit_store import MEASUREMENTS, Audit, Outcome, Store
from diagnostics.store.keys import described, digest, key
from probes.errors import InputError

if TYPE_CHECKING:
    from diagnostics.store.factor_cache import FactorCache
    from probes import CheckpointPair
    from probes.checkpoints.series import CheckpointSeries

UNFINISHED = "not finished; run the same command again to go on"


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
        dtype: of the models, for the analyses that run them; the default of each otherwise.
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
        InputError, UnknownNameError: the input is wrong; nothing has been run or written.
        OSError: `out` cannot be written; what was finished is kept.
        RuntimeError: the report could not be drawn; all else is written.
    """
    names, broken = usable(only, skip)
    reasons = {name: why for name, why in (aside or {}).items() if name in names}
    names = [name for name in names if name not in reasons]
    rules = policy if isinstance(policy, Policy) else load_policy(policy) if policy else default_policy()
    where = environment.device(device)
    common = {"dtype": environment.dtype(dtype), "seed": seed}
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
        raise InputError(f"nothing to run: {'; '.join(lines) or 'every analysis is left out'}")
    store = Store(out)
    from diagnostics.store.factor_cache import FactorCache
    from probes import CheckpointPair
    from probes.checkpoints.series import CheckpointSeries

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
                **broken,
                **{name: reason for name, reason in lacking.items() if reason},
            },
            policy=rules,
            device=where,
            cache=FactorCache.at(cache),
            fresh=fresh,
            progress=progress,
            options={"only": only, "skip": skip, "settings": settings or {}, "engine": engine, **common},
            notes=(
                *run_notes(series),
                *(f"Left out: {why}" for why in broken.values()),
                *unread_role_notes(rows, names),
                *adapter_notes(pair),
            ),
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
    from probes.checkpoints.series import TooShortError

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
        environment={**environment.environment(device), "seed": options["seed"]},
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
