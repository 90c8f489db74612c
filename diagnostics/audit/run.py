"""The audit: run the analyses that have their inputs, one by one, and keep each as soon as it is finished."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.audit.plan import (
    Plan,
    Progress,
    Settings,
    make_plan,
    name_list,
    resolve_policy,
    unread_role_notes,
)
from diagnostics.audit.step import new_audit, run_analysis, write_report
from diagnostics.core.analysis import Analysis, NotApplicableError
from diagnostics.core.inputs import ROLES, Files, open_roles
from diagnostics.core.policy import Policy
from diagnostics.core.registry import find
from diagnostics.execution import engines, environment
from diagnostics.store.audit_store import MEASUREMENTS, Audit, Outcome, Store
from diagnostics.store.keys import described, digest, key, one_line
from diagnostics.store.occupied import other_audit, refuse_occupied, stranger
from probes.errors import InputError

if TYPE_CHECKING:
    from diagnostics.store.factor_cache import FactorCache
    from probes import CheckpointPair
    from probes.checkpoints.series import CheckpointSeries

# Reads every tensor of both sides; without it they are looked through for NaN alone.
INTEGRITY = "integrity"
NOT_FINISHED = "not finished; run the same command again to go on"


def audit(
    base: Any, tuned: Any, *, out: str | Path = "audit",
    only: str | Collection[str] = (), skip: str | Collection[str] = (), settings: Settings | None = None,
    policy: Policy | str | Path | None = None,
    device: str = "auto", dtype: str | None = None, seed: int = 0, engine: str = "local",
    cache: "FactorCache | str | Path | None" = None, fresh: bool = False, replace: bool = False,
    progress: Progress | None = None,
    task: Files = (), keep: Files = (), guard: Files = (), ood: Files = (), train: Files = (),
    adapter: Any = None, limit: int | None = None, chat_template: bool = False, approximate: bool = False,
    trust_remote_code: bool = False,
    series: "CheckpointSeries | None" = None, left_out: Mapping[str, str] | None = None,
) -> Audit:  # fmt: skip
    """Measure what tuning did, judge it, and write the audit and its report into a directory.

    Each finished analysis is written at once; after a kill the same call continues. A result is reused only
    when the checkpoints, rows, parameters, versions and sources that it depends on are the same.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> audit(BUNDLED / "base", BUNDLED / "lora-r8", only=["intruders"]).verdict
    'warn'

    Args:
        base, tuned: whatever `probes.open_checkpoint` opens.
        out: directory of the audit; created if missing.
        only, skip: names of the analyses to run, or to leave out; by default all that have their inputs.
        settings: parameters by analysis, in place of their defaults.
        policy: thresholds, or a TOML file of them; by default the one that ships with the package.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: of the models, for the analyses that run them; by default each one's own.
        seed: for the analyses that take one.
        engine: where work that splits runs: `local`, `local:N`, `dask://HOST:PORT`, `ray://HOST:PORT`.
        cache: directory of factorizations of a base, for the next model tuned from it; changes no result.
        fresh: ignore earlier results in `out`.
        replace: write into `out` even if it holds a model, files of others, or another pair's audit. Only an
            audit is removed.
        progress: called with (analysis, done, total, current item).
        task, keep, guard, ood, train: files of rows by role, one or several; `NAME=F` names one of `ood`.
        adapter: the adapter that was merged into tuned, if any: the merge is checked.
        limit: read only the first rows of each file.
        chat_template, approximate, trust_remote_code: for the analyses that take them: wrap each row as a
            user message, nats per byte even where tokenizers agree, run code from the repository.
        series: the run with these two ends, for the analyses of a series; by default just the two.
        left_out: analyses that do not run, with the reason.

    Raises:
        InputError, UnknownNameError: the input is wrong, or `out` is occupied; nothing was run or written.
        OSError: `out` cannot be written; finished analyses are kept.
        RuntimeError: the report could not be drawn; everything else is written.
    """
    only, skip = name_list(only), name_list(skip)
    rules = resolve_policy(policy)
    resolved_device = environment.device(device)
    flags = {"chat_template": chat_template, "approximate": approximate}
    flags |= {"trust_remote_code": trust_remote_code}
    shared = {"dtype": environment.dtype(dtype), "seed": seed} | {name: True for name in flags if flags[name]}
    given = {} if adapter is None else {"adapter": adapter}
    rows = open_roles({"task": task, "keep": keep, "guard": guard, "ood": ood, "train": train}, limit=limit)
    plan = make_plan(
        {"pair", "series", *rows, *given}, only=only, skip=skip, settings=settings or {},
        shared={name: value for name, value in shared.items() if value is not None}, left_out=left_out or {},
    )  # fmt: skip
    if not plan.parameters:
        reasons = "; ".join(f"{name} {reason}" for name, reason in plan.lacking.items())
        raise InputError(f"nothing to run: {reasons or 'every analysis is left out'}")
    store = Store(out)
    from diagnostics.store.factor_cache import FactorCache
    from probes import CheckpointPair, open_checkpoint
    from probes.checkpoints.lineage import adapter_notes, rounding_notes
    from probes.checkpoints.series import CheckpointSeries

    pair = CheckpointPair(base, tuned)
    # A run that goes on ends in another checkpoint.
    other = other_audit(store.out, pair.base, pair.tuned if series is None else None)
    if not replace:
        refuse_occupied(store.out, stranger(store.out) or other)
    if given:
        given = {"adapter": open_checkpoint(adapter, base=pair.base.base or pair.base)}
    if series is None:
        series = CheckpointSeries([pair.base, pair.tuned], steps=("base", "tuned"), complete=True)
    run_notes = []
    if len(series) > 2:
        run_notes = [f"{len(series)} checkpoints of one run: {', '.join(series.labels)}"]
    run_notes += [f"{ref} is left out: {reason}" for ref, reason in series.left_out.items()]
    with engines.engine(engine, resolved_device), store:
        return run_plan(
            store,
            plan,
            supplied={"pair": pair, "series": series, **given, **rows},
            policy=rules,
            device=resolved_device,
            cache=FactorCache.at(cache),
            fresh=fresh or other is not None,
            progress=progress,
            options={"only": only, "skip": skip, "settings": settings or {}, "engine": engine, **shared}
            | {name: checkpoint.ref for name, checkpoint in given.items()},
            notes=(
                *run_notes,
                *plan.notes,
                *unread_role_notes(rows, [*plan.parameters, *plan.lacking]),
                *adapter_notes(pair.base, pair.tuned, *given.values()),
                *(rounding_notes(pair.base, pair.tuned) if rows else ()),
            ),
        )


def run_plan(
    store: Store, plan: Plan, *, supplied: Mapping[str, Any], policy: Policy, device: str,
    cache: "FactorCache | None", fresh: bool, progress: Progress | None, options: Mapping[str, Any],
    notes: tuple[str, ...],
) -> Audit:  # fmt: skip
    """Run a plan whose inputs are checked, in a directory that is locked."""
    from probes.checkpoints.series import TooShortError

    pair: CheckpointPair = supplied["pair"]
    series: CheckpointSeries = supplied["series"]
    earlier = None if fresh else store.earlier()
    if fresh:
        store.clear()
    stamps = {side: digest(getattr(pair, side).stamp()) for side in ("base", "tuned")}
    series_stamp = {"series": digest(*series.stamps, *map(str, series.labels))}
    adapter_stamp = {"adapter": digest(supplied["adapter"].stamp())} if "adapter" in supplied else {}
    rows = {role: [named.describe() for named in supplied[role]] for role in ROLES if role in supplied}
    keys = {
        name: key(find(name), used, stamps_of(find(name), stamps, series_stamp | adapter_stamp), rows)
        for name, used in plan.parameters.items()
    }
    if earlier is not None and any(stamps[side] != getattr(earlier, side).get("stamp") for side in stamps):
        earlier = None  # of other checkpoints
    previous = [*earlier.kept.items(), *earlier.analyses.items()] if earlier is not None else []
    saved = {name: outcome for name, outcome in previous if outcome.result is not None}
    outcomes = plan.outcomes(Outcome(status="failed", fault="unfinished", reason=NOT_FINISHED))
    for name in keys:
        if name in saved and saved[name].key == keys[name]:
            outcomes[name] = replace(saved[name], reused=True)
    sides: dict[str, Any] = {"base": pair.base, "tuned": pair.tuned}
    facts = {
        side: {"ref": checkpoint.ref, "kind": checkpoint.kind, "fingerprint": None, "stamp": stamps[side]}
        for side, checkpoint in sides.items()
    }
    state = new_audit(
        store, device, options, **facts, data=rows, policy=policy, analyses=outcomes, notes=notes,
        kept={name: outcome for name, outcome in saved.items() if name not in keys},
        unmatched=tuple(asdict(tensor) for tensor in pair.unmatched),
    )  # fmt: skip
    store.begin(state)
    for name in [name for name in keys if outcomes[name].result is None]:
        # Without stamps: a measurement of one checkpoint stays valid in a longer series.
        context = key(find(name), plan.parameters[name], {}, rows)
        inputs = {**supplied, "series": series.within(context, store.out / MEASUREMENTS)}
        outcome = run_analysis(
            store, find(name), plan.parameters[name], inputs, device=device, cache=cache, progress=progress,
            skip_on=() if name in options["only"] else (NotApplicableError, TooShortError),
        )  # fmt: skip
        state = replace(state, analyses={**state.analyses, name: replace(outcome, key=keys[name])})
        store.write(state)
    base, tuned, fingerprint_notes = described(pair, earlier)
    notes = (*state.notes, *fingerprint_notes)
    state = replace(state, base={**state.base, **base}, tuned={**state.tuned, **tuned}, notes=notes)
    if INTEGRITY not in keys:
        state = finite_or_failed(state, pair, earlier)
    store.write(state)
    write_report(store, state)
    return state


def finite_or_failed(state: Audit, pair: "CheckpointPair", earlier: Audit | None) -> Audit:
    """The audit with `integrity` as failed where a tensor is NaN or infinite that no analysis may have read.

    Args:
        earlier: an audit of the same files; its findings on them are used again.
    """
    from probes.checkpoints.usable import in_a_line, not_finite

    sides: dict[str, Any] = {}
    for side in ("base", "tuned"):
        line = getattr(earlier, side, {}).get("not_finite")
        try:
            if line is None:
                line = in_a_line(not_finite(getattr(pair, side)))
        except (InputError, OSError) as error:  # a file that vanishes meanwhile must not cost the results
            return replace(state, notes=(*state.notes, f"not looked through for NaN: {one_line(error)}"))
        sides[side] = {**getattr(state, side), "not_finite": line}
    reasons = [
        f"{side} {part['ref']}: {part['not_finite']}" for side, part in sides.items() if part["not_finite"]
    ]
    state = replace(state, **sides)
    if not reasons:
        return state
    reason = f"{'; '.join(reasons)}: the file is damaged or its training diverged; take another checkpoint"
    failed = Outcome(status="failed", fault="input", reason=reason)
    return replace(state, analyses={**state.analyses, INTEGRITY: failed})


def stamps_of(record: Analysis, pair: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
    """The stamps of all checkpoints that an analysis reads: the pair's, and of its other inputs."""
    return {**pair, **{name: others[name] for name in (*record.inputs, *record.optional) if name in others}}
