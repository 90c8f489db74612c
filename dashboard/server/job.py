"""One audit in a process of its own, which says how far it is: lines of JSON on its standard output.

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
    """Run the audit; the exit code, 0 whatever its verdict."""
    from diagnostics.audit.run import audit

    request = json.loads(argument)
    try:
        made = audit(request.pop("base"), request.pop("tuned"), progress=progress(request, out), **request)
    except (InputError, OSError) as error:
        say(out, error=" ".join(str(error).split()))
        return 2
    say(out, verdict=made.verdict)
    return 0


def say(out: TextIO, **about: Any) -> None:
    """Write one line."""
    out.write(json.dumps(about) + "\n")
    out.flush()


def progress(request: Mapping[str, Any], out: TextIO) -> Callable[[str, int, int, str], None]:
    """Tells how far an audit is: which of its analyses, and how far that one is."""
    names = planned(request)
    last = 0.0
    before = ""

    def told(analysis: str, done: int, total: int, what: str) -> None:
        nonlocal last, before
        now = time.monotonic()
        if analysis == before and now - last < PAUSE:
            return
        last, before = now, analysis
        place = names.index(analysis) if analysis in names else 0
        share = (place + (done / total if total else 0.0)) / max(1, len(names))
        say(out, analysis=analysis, done=done, total=total, what=what, share=min(1.0, share))

    return told


def planned(request: Mapping[str, Any]) -> list[str]:
    """The analyses that an audit will run, in its order."""
    from diagnostics.audit.plan import chosen_analyses, missing_inputs
    from diagnostics.core.analysis import find
    from diagnostics.core.inputs import ROLES

    supplied = {"pair", "series", *(role for role in ROLES if request.get(role))}
    return [
        name
        for name in chosen_analyses(request.get("only") or (), ())
        if not missing_inputs(find(name), supplied)
    ]


if __name__ == "__main__":
    # What libraries print is for the log; the lines of progress keep to themselves.
    lines, sys.stdout = sys.stdout, sys.stderr
    sys.exit(main(sys.argv[1], lines))
