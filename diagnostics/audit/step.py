"""One analysis of an audit: run, written, and kept apart from the others when it fails."""

import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from diagnostics.audit.plan import Progress, about
from diagnostics.core.analysis import Analysis
from diagnostics.core.inputs import ROLES
from diagnostics.execution import environment
from diagnostics.store.audit_store import Audit, Outcome, Store
from diagnostics.store.files import CannotWriteError
from diagnostics.store.keys import one_line
from probes.errors import InputError

if TYPE_CHECKING:
    from diagnostics.store.factor_cache import FactorCache


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
    memory = environment.PeakMemory()
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
            outcome = refused(error) if isinstance(error, InputError) else crashed(store, record.name, error)
    return replace(
        outcome,
        seconds=round(seconds, 3),
        peak_rss_mb=memory.megabytes(),
        device=device,
        **about(record.name),
    )


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
