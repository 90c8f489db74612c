"""The audit on disk: results, how they came about, and enough to continue after a kill.

`audit.json` holds everything but the tables, which are parquet files in the same directory. Each file is
replaced in one step, so that no reader sees half of it. A finished analysis carries a key of all that it
depends on and is used again only under the same key.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from diagnostics.core.analysis import Result, plain
from diagnostics.core.policy import Finding, Policy, Verdict, judge, judged, not_measured, parse, verdict
from diagnostics.core.registry import installed
from diagnostics.store.files import number, read_table, replacing, to_json, write_table, writing
from probes.errors import InputError
from probes.files.untrusted import confined, one_line

SCHEMA = 1
# The types of the fields of audit.json, and of an entry under `analyses`; a list is one of such parts.
FIELDS: dict[str, Any] = {
    "base": dict, "tuned": dict, "policy": dict, "analyses": dict, "kept": dict, "created": str,
    "tunescope": str, "data": dict, "environment": dict, "options": dict, "unmatched": [dict], "notes": [str],
}  # fmt: skip
ENTRY: dict[str, Any] = {
    "status": str, "reason": str | None, "fault": str | None, "seconds": int | float,
    "peak_rss_mb": int | float | None, "device": str | None, "key": str | None, "question": str, "paper": str,
    "reused": bool, "parameters": dict, "metrics": dict, "tables": dict, "masks": dict, "notes": [str],
}  # fmt: skip
# Fields that audit.json holds as they are.
PLAIN = ("base", "tuned", "created", "tunescope", "data", "environment", "options")
# Inside an audit's directory.
FOLDERS = ("tables", "masks")
# Also there: measurements on single checkpoints of a series, for a run that continues.
MEASUREMENTS = "measurements"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one analysis in an audit.

    Attributes:
        peak_rss_mb: largest resident memory of this process during the run, MB (1e6 bytes); None if unknown.
        question, paper: as registered when it ran, so that an audit reads without the package.
    """

    status: Literal["ok", "skipped", "failed"]
    reason: str | None = None  # why there is no result, in one line
    fault: Literal["input", "crash", "unfinished"] | None = None
    seconds: float = 0.0  # wall clock of its run
    peak_rss_mb: float | None = None
    device: str | None = None
    key: str | None = None  # hash of all that the result depends on
    question: str = ""
    paper: str = ""
    reused: bool = False  # whether the result is that of an earlier run
    result: Result | None = None


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Two checkpoints, the results of analyses on them, and the policy that judges these.

    >>> import tempfile
    >>> from diagnostics.audit.demo import BUNDLED
    >>> from diagnostics.audit import audit
    >>> saved = audit(BUNDLED / "base", BUNDLED / "lora-r1", out=tempfile.mkdtemp(), only=["intruders"])
    >>> saved.results["intruders"].metrics["matrices"]
    28

    Attributes:
        base, tuned: `Checkpoint.describe()`; the fingerprint is None until it has been computed.
        data: the files of each role: name, ref, fingerprint, rows.
        environment: versions, device, seed, threads.
        options: how the audit was asked for.
        analyses: outcome of every installed analysis by name.
        kept: results of earlier runs on the same checkpoints that were not asked for this time.
        unmatched: tensors that do not align: tensor, reason, base_shape, tuned_shape.
        notes: what a reader must know about the audit as a whole.
        created: when it began, UTC, ISO 8601.
        path: its directory, if it has one.
    """

    base: Mapping[str, Any]
    tuned: Mapping[str, Any]
    policy: Policy
    analyses: Mapping[str, Outcome]
    created: str
    tunescope: str
    data: Mapping[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, Outcome] = field(default_factory=dict)
    unmatched: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    path: Path | None = None

    @property
    def results(self) -> dict[str, Result]:
        """The results of the analyses that have one, by name."""
        return {name: outcome.result for name, outcome in self.analyses.items() if outcome.result is not None}

    @cached_property
    def findings(self) -> list[Finding]:
        """Everything beyond a threshold of the policy, the severest first."""
        findings = [finding for result in self.results.values() for finding in judge(result, self.policy)]
        return sorted(findings, key=lambda finding: finding.severity != "fail")

    @cached_property
    def not_measured(self) -> dict[str, dict[str, str]]:
        """The rules that could not be applied: analysis -> metric -> why."""
        reasons = {name: not_measured(result, self.policy) for name, result in self.results.items()}
        return {name: rules for name, rules in reasons.items() if rules}

    @property
    def judged(self) -> int:
        """How many rules of the policy had a number to judge."""
        return sum(len(judged(result, self.policy)) for result in self.results.values())

    @property
    def failed(self) -> dict[str, Outcome]:
        """The analyses that have no result although they should, by name."""
        return {name: outcome for name, outcome in self.analyses.items() if outcome.status == "failed"}

    @property
    def verdict(self) -> Verdict:
        """The severest finding; `fail` also where an analysis failed: nothing shows that it passes."""
        return "fail" if self.failed else verdict(self.findings)

    @property
    def exit_code(self) -> int:
        """0 the policy passes, 1 it fails, 2 an analysis refused its input, 3 one broke or is unfinished."""
        faults = {outcome.fault for outcome in self.failed.values()}
        if faults:
            return 2 if faults == {"input"} else 3
        return 1 if self.verdict == "fail" else 0

    def record(self) -> dict[str, Any]:
        """The contents of audit.json, as plain values."""
        return {
            "schema": SCHEMA, "tunescope": self.tunescope, "created": self.created,
            "base": plain(self.base), "tuned": plain(self.tuned), "data": plain(self.data),
            "environment": plain(self.environment), "options": plain(self.options),
            "verdict": self.verdict, "exit_code": self.exit_code,
            "findings": [asdict(finding) for finding in self.findings], "not_measured": self.not_measured,
            "policy": {"origin": self.policy.origin, "rules": self.policy.plain()},
            "analyses": {name: outcome_record(name, outcome) for name, outcome in self.analyses.items()},
            "kept": {name: outcome_record(name, outcome) for name, outcome in self.kept.items()},
            "unmatched": plain(self.unmatched), "notes": list(self.notes),
        }  # fmt: skip


def outcome_record(name: str, outcome: Outcome) -> dict[str, Any]:
    """One entry under `analyses` in audit.json."""
    record = {k: getattr(outcome, k) for k in Outcome.__dataclass_fields__ if k != "result"}
    result = outcome.result or Result(metrics={}, tables={})
    return record | {
        "parameters": dict(result.parameters),
        "metrics": dict(result.metrics),
        "notes": list(result.notes),
        "tables": {table: table_file(name, table) for table in result.tables},
        "masks": {mask: mask_file(name, mask) for mask in result.masks},
    }


def table_file(name: str, table: str) -> str:
    """Where a table lies inside an audit; an InputError for a name that could leave its directory."""
    return f"tables/{safe(name, table)}.parquet"


def mask_file(name: str, mask: str) -> str:
    """Where a mask lies inside an audit; the errors are those of `table_file`."""
    return f"masks/{safe(name, mask)}.safetensors"


def safe(*words: str) -> str:
    """The stem of a file's name, refused where a word could leave its directory."""
    for word in words:
        if not re.fullmatch(r"[\w-]{1,100}", word):
            raise InputError(f"{word!r} cannot name an analysis or a table; use letters, digits, _ and -")
    return ".".join(words)


class Store:
    """One audit's directory while an audit runs; entered, it is locked against other writers.

    Raises:
        InputError: on construction, when `out` cannot be an audit's directory.
    """

    def __init__(self, out: str | Path):
        self.out = Path(out)
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out {self.out}: is a file, not a directory; name another place")

    def __enter__(self) -> "Store":
        with writing(self.out):
            for folder in FOLDERS:
                (self.out / folder).mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.out / ".lock", blocking=False)
            try:
                self.lock.acquire()
            except Timeout:
                raise InputError(
                    f"--out {self.out}: another tunescope is writing there; wait for it or name another place"
                ) from None
            for folder in (".", *FOLDERS, MEASUREMENTS):
                for left in self.out.glob(f"{folder}/.*.part"):
                    left.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def earlier(self) -> Audit | None:
        """What an earlier run left here; a result whose tables are damaged counts as not there."""
        if not (self.out / "audit.json").exists():
            return None
        try:
            return load(self.out, damaged="drop")
        except ValueError as error:
            raise InputError(f"{error}; start over with --fresh") from error

    def clear(self) -> None:
        """Remove what audits write here, and nothing else."""
        files = [*self._files(), *self.out.glob(f"{MEASUREMENTS}/*.npz")]
        with writing(self.out):
            for path in [self.out / name for name in ("audit.json", "report.html", "audit.log")]:
                path.unlink(missing_ok=True)
            for path in files:
                path.unlink()

    def begin(self, audit: Audit) -> None:
        """Write an audit that is about to run; a report of the one before would contradict it."""
        with writing(self.out):
            (self.out / "report.html").unlink(missing_ok=True)
        self.write(audit)

    def write_result(self, name: str, result: Result) -> None:
        """Write the tables and masks of one result, each in one step."""
        for table, frame in result.tables.items():
            write_table(self.out / table_file(name, table), frame)
        for mask, patch in result.masks.items():
            if not isinstance(patch, Path):
                with replacing(self.out / mask_file(name, mask)) as part:
                    patch.save(part)

    def write(self, audit: Audit) -> None:
        """Write audit.json in one step, and drop the tables and masks that it no longer names."""
        files = set(self._files())
        with replacing(self.out / "audit.json") as part:
            part.write_text(to_json(audit.record()), encoding="utf-8")
        named = set()
        for name, outcome in (*audit.analyses.items(), *audit.kept.items()):
            if outcome.result is not None:
                named |= {self.out / table_file(name, table) for table in outcome.result.tables}
                named |= {self.out / mask_file(name, mask) for mask in outcome.result.masks}
        for path in files - named:
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """The tables and masks of analyses that lie here; other files in their folders are not ours."""
        files = (*self.out.glob("tables/*.parquet"), *self.out.glob("masks/*.safetensors"))
        return [file for file in files if file.name.partition(".")[0] in self._analyses]

    @cached_property
    def _analyses(self) -> set[str]:
        """The installed analyses, and those of the audit that lies here."""
        names = set(installed())
        with suppress(InputError):
            earlier = load(self.out, damaged="drop")
            names |= {*earlier.analyses, *earlier.kept}
        return names

    def log(self, text: str) -> None:
        """Append to audit.log, where tracebacks go."""
        with writing(self.out / "audit.log") as path, path.open("a", encoding="utf-8") as log:
            log.write(text.rstrip() + "\n\n")


def load(path: str | Path, *, damaged: Literal["refuse", "drop"] = "refuse") -> Audit:
    """Open a saved audit; its results are drawn and judged as those of a fresh one.

    >>> import tempfile
    >>> from diagnostics.audit.demo import BUNDLED
    >>> from diagnostics.audit import audit
    >>> saved = audit(BUNDLED / "base", BUNDLED / "lora-r1", out=tempfile.mkdtemp(), only=["intruders"])
    >>> load(saved.path).verdict == saved.verdict
    True

    Args:
        path: the directory of an audit, or its audit.json.
        damaged: whether a result whose table cannot be read makes the audit unreadable or is left out.

    Raises:
        InputError: no audit there, a damaged one, or one of a newer schema.
    """
    directory = Path(path).parent if Path(path).name == "audit.json" else Path(path)
    file = directory / "audit.json"
    with one_line(file):
        try:
            record = json.loads(confined(file, directory, "audit").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{path}: no audit here (there is no audit.json)") from error
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from error
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise InputError(f"{file}: damaged, not JSON: {reason}") from error
        schema = record.get("schema") if isinstance(record, dict) else None
        if not isinstance(schema, int):
            raise InputError(f"{file}: not an audit of tunescope")
        if schema > SCHEMA:
            newer = f"schema {schema} is newer than this tunescope reads ({SCHEMA})"
            raise InputError(f"{file}: {newer}; upgrade tunescope")
        try:
            return audit_of(record, directory, damaged)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: damaged: {type(error).__name__} {error}") from error


def typed(record: Any, kinds: Mapping[str, Any], file: Path, where: str) -> None:
    """Check the types of a part of audit.json, on which all later code relies."""
    if not isinstance(record, dict):
        raise InputError(f"{file}: damaged: {where or 'it '}is no object")
    for key, kind in kinds.items():
        value: Any = record.get(key)
        right = isinstance(value, list if isinstance(kind, list) else kind)
        if right and isinstance(kind, list):
            right = all(isinstance(item, kind[0]) for item in value)
        if key in record and not right:
            raise InputError(f"{file}: damaged: {where}{key} is {value!r:.80}")
    if record.get("status", "ok") not in ("ok", "skipped", "failed"):
        raise InputError(f"{file}: damaged: {where}status is {record['status']!r:.80}")


def audit_of(record: Mapping[str, Any], directory: Path, damaged: str) -> Audit:
    """The audit that audit.json holds."""
    file = directory / "audit.json"
    typed(record, FIELDS, file, "")
    typed(record["policy"], {"rules": dict, "origin": str}, file, "policy: ")
    rules, origin = record["policy"]["rules"], record["policy"]["origin"]
    try:
        policy = parse(rules, origin=origin)
    except (ValueError, LookupError) as error:
        raise InputError(f"{file}: damaged: {error}") from error

    def outcomes(entries: Mapping[str, Any]) -> dict[str, Outcome]:
        by_name = {}
        for name, entry in entries.items():
            typed(entry, ENTRY, file, f"{name}: ")
            outcome = Outcome(**{k: entry[k] for k in Outcome.__dataclass_fields__ if k in entry})
            if outcome.status == "ok":
                try:
                    outcome = replace(outcome, result=result_of(name, entry, directory))
                except ValueError:
                    if damaged == "refuse":
                        raise
                    continue
            by_name[name] = outcome
        return by_name

    return Audit(
        policy=policy, analyses=outcomes(record["analyses"]), kept=outcomes(record["kept"]), path=directory,
        unmatched=tuple(record["unmatched"]), notes=tuple(record["notes"]),
        **{name: record[name] for name in PLAIN},
    )  # fmt: skip


def result_of(name: str, entry: Mapping[str, Any], directory: Path) -> Result:
    """The result that an entry under `analyses` holds, its tables read."""
    record = directory / "audit.json"
    try:
        table_files = {table: table_file(name, table) for table in entry["tables"]}
        mask_files = {mask: mask_file(name, mask) for mask in entry.get("masks", {})}
        metrics = {metric: number(value) for metric, value in entry["metrics"].items()}
    except ValueError as error:
        raise InputError(f"{record}: damaged: {name}: {error}") from error
    # An audit from elsewhere must not make us open what lies outside it.
    tables = {}
    for table, file in entry["tables"].items():
        if file != table_files[table]:
            raise InputError(f"{record}: damaged: table {table} of {name} is said to be {file!r}")
        tables[table] = read_table(confined(directory / file, directory, "audit"))
    masks = {}
    for mask, file in entry.get("masks", {}).items():
        if file != mask_files[mask] or not (directory / file).is_file():
            raise InputError(f"{record}: damaged: mask {mask} of {name} is missing")
        masks[mask] = confined(directory / file, directory, "audit")
    about: dict[str, Any] = {"analysis": name, "parameters": entry["parameters"]}
    return Result(metrics=metrics, tables=tables, masks=masks, notes=tuple(entry["notes"]), **about)
