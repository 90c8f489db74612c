"""One audit in its own process, which writes its progress to standard output as lines of JSON.

`python -m dashboard.server.job '{"base": …, "tuned": …, "out": …}'`; the arguments are those of
`diagnostics.audit.audit`.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from probes.errors import InputError

PAUSE = 0.2  # seconds between two lines of progress


def main(argument: str, out: TextIO) -> int:
    """Run the audit. The exit code is 0 for every verdict."""
    from diagnostics.audit.run import audit

    request = json.loads(argument)
    try:
        done = audit(request.pop("base"), request.pop("tuned"), progress=progress(request, out), **request)
    except (InputError, OSError) as error:
        write_line(out, error=" ".join(str(error).split()))
        return 2
    write_line(out, verdict=done.verdict)
    return 0


def write_line(out: TextIO, **fields: Any) -> None:
    """Write one line of JSON."""
    out.write(json.dumps(fields) + "\n")
    out.flush()


def progress(request: Mapping[str, Any], out: TextIO) -> Callable[[str, int, int, str], None]:
    """A progress callback that writes which analysis runs and the share of the audit that is done."""
    names = planned(request)
    last = 0.0
    before = ""

    def report(analysis: str, done: int, total: int, what: str) -> None:
        nonlocal last, before
        now = time.monotonic()
        if analysis == before and now - last < PAUSE:
            return
        last, before = now, analysis
        position = names.index(analysis) if analysis in names else 0
        share = (position + (done / total if total else 0.0)) / max(1, len(names))
        write_line(out, analysis=analysis, done=done, total=total, what=what, share=min(1.0, share))

    return report


def planned(request: Mapping[str, Any]) -> list[str]:
    """The analyses that an audit will run, in order."""
    from diagnostics.audit.plan import missing_inputs, usable_analyses
    from diagnostics.core.inputs import ROLES
    from diagnostics.core.registry import find

    supplied = {"pair", "series", *(role for role in ROLES if request.get(role))}
    names, _ = usable_analyses(request.get("only") or (), ())
    return [name for name in names if not missing_inputs(find(name), supplied)]


if __name__ == "__main__":
    # Libraries print to the log; only lines of progress go to standard output.
    lines, sys.stdout = sys.stdout, sys.stderr
    sys.exit(main(sys.argv[1], lines))
