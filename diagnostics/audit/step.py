"""One step of an audit: run an analysis and write its result, or draw the report."""

import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from diagnostics.audit.plan import Progress, registry_facts
from diagnostics.core.analysis import Analysis
from diagnostics.core.inputs import ROLES
from diagnostics.execution import environment
from diagnostics.store.audit_store import Audit, Outcome, Store
from diagnostics.store.files import CannotWriteError
from diagnostics.store.keys import one_line
from probes.errors import InputError

if TYPE_CHECKING:
    from diagnostics.store.factor_cache import FactorCache


def new_audit(store: Store, device: str, options: Mapping[str, Any], **parts: Any) -> Audit:
    """An audit that begins now, in the directory of a store."""
    return Audit(
        environment={**environment.environment(device), "seed": options["seed"]}, options=options,
        created=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        tunescope=version("tunescope"), path=store.out, **parts,
    )  # fmt: skip


def run_analysis(
    store: Store, record: Analysis, used: Mapping[str, Any], supplied: Mapping[str, Any], *, device: str,
    cache: "FactorCache | None" = None, progress: Progress | None, skip_on: tuple[type[InputError], ...] = (),
) -> Outcome:  # fmt: skip
    """Run one analysis and write its tables and masks; an error becomes its outcome.

    An `InputError` means that the input is wrong. Any other error is a crash, a `ValueError` or `KeyError` of
    a library included: its traceback goes to audit.log.

    Args:
        used: parameters of the analysis.
        supplied: inputs by name.
        skip_on: input errors after which the analysis counts as skipped, not as failed.

    Raises:
        CannotWriteError: the audit's directory cannot be written.
    """
    bar = partial(progress, record.name) if progress else None
    execution = {"device": device, "cache": cache, "progress": bar}
    inputs = {
        name: {rows.name: rows.task for rows in supplied[name]} if name in ROLES else supplied[name]
        for name in (*record.inputs, *record.optional)
        if name in supplied
    }
    where = {name: value for name, value in execution.items() if name in record.parameters}
    began = time.perf_counter()
    with environment.PeakMemory() as memory:
        try:
            result = record.function(**inputs, **used, **where)
            seconds = time.perf_counter() - began
            store.write_result(record.name, result)
            outcome = Outcome(status="ok", result=result)
        except CannotWriteError:
            raise
        except Exception as error:
            seconds = time.perf_counter() - began
            outcome = failed_outcome(store, record.name, error, skip_on)
    return replace(
        outcome, seconds=round(seconds, 3), peak_rss_mb=memory.megabytes(), device=device,
        **registry_facts(record.name),
    )  # fmt: skip


def failed_outcome(
    store: Store, name: str, error: Exception, skip_on: tuple[type[InputError], ...]
) -> Outcome:
    """The outcome of an analysis that raised: skipped, wrong input, or a crash, logged in audit.log."""
    if isinstance(error, skip_on):
        return Outcome(status="skipped", reason=one_line(error))
    if isinstance(error, InputError):
        return Outcome(status="failed", fault="input", reason=one_line(error))
    text = "".join(traceback.format_exception(error))
    store.log(f"{datetime.now(UTC).isoformat(timespec='seconds')} {name}\n{text}")
    reason = f"{type(error).__name__}: {one_line(error)} (traceback in audit.log)"
    return Outcome(status="failed", fault="crash", reason=reason)


def write_report(store: Store, state: Audit) -> None:
    """Write report.html; a RuntimeError if it cannot be drawn."""
    from diagnostics.report.render import write_html

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
