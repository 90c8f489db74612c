"""Targets and inputs of what is no checkpoint: rows, audits and their tables, series, policies, detectors."""

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from dashboard.state.audit_library import AuditLibrary
from dashboard.state.steps import read_steps
from diagnostics.core.analysis import Result
from diagnostics.core.policy import parse
from diagnostics.core.policy_file import load_policy
from diagnostics.store.audit_store import Audit, Outcome, Store, load
from diagnostics.store.files import read_table, to_json
from probes.checkpoints.mask_file import Patch
from probes.text.rows import class_ids, read_task
from tests.fuzz import checkpoints
from tests.fuzz.bundle import LINK, LINKS, RAW, File, pack, unpack
from tests.fuzz.hostile import OUTSIDE, TEXTS, damaged, documents, edited, encoded, rarely, scalars

TABLE = pd.DataFrame(
    {"matrix": ["a", "b"], "layer": [0, 1], "norm": [1.5, float("nan")], "new": [True, False]}
)


def audit_files(directory: Path) -> None:
    """Write an audit as `tunescope audit` does."""
    mask = Patch(index={"w": torch.tensor([1])}, values={"w": torch.ones(1)}, base="00", tuned="01", about={})
    result = Result(
        metrics={"norm": 3.0, "count": 2},
        tables={"matrices": TABLE, "vectors": TABLE},
        notes=("one", "two"),
        masks={"task": mask},
        analysis="made",
        parameters={"k": 10, "parts": ["block"], "full_finetune": True},
    )
    rules = {
        "made": {"norm": {"warn": 1, "fail": 20, "per": "k"}, "count": {"warn": 1, "when": "full_finetune"}}
    }
    audit = Audit(
        base={"ref": "base", "fingerprint": "00"},
        tuned={"ref": "tuned", "fingerprint": "01"},
        policy=parse(rules, "a policy"),
        analyses={
            "made": Outcome(status="ok", result=result, seconds=1.5, key="k"),
            "other": Outcome(status="skipped", reason="it was not asked for"),
        },
        created="2026-01-01T00:00:00Z",
        tunescope="0.1.0",
        data={"task": [{"name": "a", "ref": "a.jsonl", "fingerprint": "00", "rows": 3}]},
        environment={"device": "cpu", "threads": 1},
        options={"only": None},
        notes=("a note",),
        unmatched=({"tensor": "w", "reason": "extra in tuned", "base_shape": None, "tuned_shape": [2]},),
        path=directory,
    )
    with Store(directory) as store:
        store.write_result("made", result)
        store.write(audit)


# --------------------------------------------------------------------------------------------- targets


def prepare(home: Path) -> None:
    """A whole audit to begin with, and decoys that could be read if anybody went there."""
    checkpoints.prepare(home)
    audit_files(home / "audit")
    TABLE.to_parquet(home / "outside" / "secret.parquet")


def jsonl(data: bytes, directory: Path) -> None:
    """A task as JSONL."""
    (directory / "x.jsonl").write_bytes(data)
    read_rows(directory / "x.jsonl")


def csv(data: bytes, directory: Path) -> None:
    """A task as CSV."""
    (directory / "x.csv").write_bytes(data)
    read_rows(directory / "x.csv")


def read_rows(path: Path) -> None:
    """A task, its messages, and the classes of its rows."""
    task = read_task(path)
    task.at_least(1)
    assert task.where(0)
    for row in task.rows:
        assert json.dumps(vars(row)).encode()
    if task.shape == "label":
        class_ids(task, ["a", "b"])


def audit(data: bytes, directory: Path) -> None:
    """An audit's directory; what is missing in it is whole."""
    unpack(data, directory)
    for folder in ("tables", "masks"):
        for intact in (directory.parent / "audit" / folder).iterdir():
            part = directory / folder / intact.name
            if not part.exists() and not part.is_symlink():
                part.parent.mkdir(exist_ok=True)
                part.write_bytes(intact.read_bytes())
    (directory / "series.json").unlink(missing_ok=True)  # it would make a series of it
    library = AuditLibrary([directory, directory.parent / "audit"])
    first, other = library.audits
    assert (first.audit is None) == bool(first.damage)
    assert other.audit, other.damage
    loaded = load(directory)
    to_json(loaded.record())
    assert loaded.verdict in ("pass", "warn", "fail")
    assert loaded.exit_code in (0, 1, 2, 3)
    assert len(loaded.findings) <= loaded.judged
    assert loaded.not_measured is not None
    assert loaded.failed is not None
    with Store(directory) as store:
        store.earlier()


def table(data: bytes, directory: Path) -> None:
    """A table of an audit."""
    (directory / "x.parquet").write_bytes(data)
    frame = read_table(directory / "x.parquet")
    frame.to_dict("list")


def series(data: bytes, directory: Path) -> None:
    """series.json, as the dashboard reads it."""
    (directory / "series.json").write_bytes(data)
    (entry,) = AuditLibrary([directory]).series
    for step in read_steps(entry):
        assert step.verdict in ("pass", "warn", "fail")
        to_json(dict(step.metrics))


def policy(data: bytes, directory: Path) -> None:
    """A policy."""
    (directory / "policy.toml").write_bytes(data)
    loaded = load_policy(directory / "policy.toml")
    to_json(loaded.plain())


# ---------------------------------------------------------------------------------------------- inputs


ROWS: tuple[dict[str, Any], ...] = (
    {"text": "a text", "group": "g"},
    {"prompt": "2 + 2 = ", "completion": "4"},
    {"prompt": "Which?", "choices": ["a", "b"], "answer": 1},
    {"text": "good", "label": "a"},
    {"text": "bad", "label": 1},
)


@st.composite
def jsonl_files(draw: DrawFn) -> bytes:
    """A few rows of one shape, of which one may be wrong."""
    row = draw(st.sampled_from(ROWS))
    lines = [encoded(row)] * draw(st.integers(0, 3))
    lines.insert(draw(st.integers(0, len(lines))), draw(documents(row, most=2)))
    return draw(damaged(st.just(draw(st.sampled_from((b"\n", b"\r\n", b"\n\n"))).join(lines))))


@st.composite
def csv_files(draw: DrawFn) -> bytes:
    """A header and rows, with quotes and cells that may be wrong."""
    row = draw(st.sampled_from(ROWS))
    header = list(row) + draw(st.lists(st.sampled_from((*TEXTS, *row)), max_size=1))
    cell = st.sampled_from((*row.values(), '["a", "b"]', '"', '""', "[" * 5000)).map(str) | scalars.map(str)
    rows = [[json.dumps(v) if isinstance(v, list) else str(v) for v in row.values()]]
    rows += draw(st.lists(st.lists(cell, min_size=1, max_size=4), max_size=3))
    if rarely(draw, 21):
        header = [""] * 30_000 if draw(st.booleans()) else [str(number) for number in range(10_000)]
    buffer = io.StringIO()
    for cells in (header, *rows):
        quoted = draw(st.booleans())
        buffer.write(",".join('"' + c.replace('"', '""') + '"' if quoted else c for c in cells))
        buffer.write(draw(st.sampled_from(("\n", "\r\n", "\n", "\r"))))
    return draw(damaged(st.just(buffer.getvalue().encode("utf-8", "surrogatepass")), often=3))


def parquet_files() -> list[bytes]:
    """Whole tables of several kinds, codecs and sizes."""
    frames = [
        pyarrow.Table.from_pandas(TABLE, preserve_index=False),
        pyarrow.Table.from_pandas(TABLE),
        pyarrow.table({"a": pyarrow.array(["x", "y", "x"]).dictionary_encode(), "b": [[1], [], [2, 3]]}),
        pyarrow.table({"t": pyarrow.array([1, 2], pyarrow.timestamp("ns", "UTC")), "d": [b"x", None]}),
        pyarrow.table({"s": [{"x": 1}, None], "n": pyarrow.nulls(2)}),
        pyarrow.table({}),
        pyarrow.table([[1], [2]], names=["a", "a"]),
    ]
    files = []
    for frame in frames:
        for codec in ("snappy", "none", "zstd", "gzip"):
            sink = io.BytesIO()
            pyarrow.parquet.write_table(frame, sink, compression=codec, write_page_checksum=codec == "snappy")
            files.append(sink.getvalue())
    return files


def repeated(batches: int, rows: int = 2**20) -> bytes:
    """A small file of very many equal rows."""
    sink = io.BytesIO()
    part = pyarrow.table({"a": pyarrow.repeat(7, rows)})
    with pyarrow.parquet.ParquetWriter(sink, part.schema, compression="zstd") as writer:
        for _ in range(batches):
            writer.write_table(part)
    return sink.getvalue()


PARQUET = parquet_files()
BOMB = repeated(256)

tables: SearchStrategy[bytes] = damaged(
    st.sampled_from((*PARQUET, *PARQUET, *PARQUET, BOMB)), often=6
).flatmap(lambda content: damaged(st.just(content), often=1))


def audit_json() -> Any:
    """audit.json of a whole audit."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        audit_files(Path(directory))
        return json.loads((Path(directory) / "audit.json").read_text())


AUDIT = audit_json()


@st.composite
def audits(draw: DrawFn) -> bytes:
    """An audit in which something may be wrong: the record, a table, a mask, a link in place of one."""
    record = draw(edited(AUDIT, most=draw(st.integers(0, 2))))
    if isinstance(record, dict) and rarely(draw, 5):
        entry = AUDIT["analyses"]["made"]
        kind = draw(st.sampled_from(("tables", "masks")))
        named_files = dict(entry[kind])
        named_files[draw(st.sampled_from((*named_files, *TEXTS, "../x")))] = draw(st.sampled_from(OUTSIDE))
        record["analyses"] = {"made": {**entry, kind: named_files}}
    files = [File("audit.json", RAW, draw(damaged(st.just(encoded(record)), often=8)))]
    places = (
        "tables/made.matrices.parquet",
        "tables/made.vectors.parquet",
        "masks/made.task.safetensors",
        "audit.json",
    )
    match draw(st.integers(0, 6)):
        case 6:
            files.insert(
                0, File(draw(st.sampled_from(places)), LINK, bytes([draw(st.integers(0, len(LINKS) - 1))]))
            )
        case 5:
            files.append(File(draw(st.sampled_from(places[:2])), RAW, draw(tables)))
    return pack(files)


SERIES = {
    "checkpoints": [
        {
            "label": str(step),
            "ref": f"run@{step}",
            "against_first": {
                "audit": "1",
                "verdict": "pass",
                "metrics": {"made": {"norm": 1.0, "n": "NaN"}},
            },
            "against_previous": {"audit": None, "verdict": "fail", "metrics": {}},
        }
        for step in (1, 2)
    ]
}


WORDS = (
    "intruders", "drift", "intruders_per_matrix", "rate", "warn", "fail", "below", "per", "when", "source",
    "message", "k", '""', '"a\\nb"', '"' + "x" * 3000 + '"', "1", "ü",
)  # fmt: skip
VALUES = (
    "1", "2.5", "-1", "nan", "inf", "true", '"text"', "[]", "{}", "1e400", "7" * 5000, "7" * 400,
    "0x" + "f" * 5000, "2026-01-01", '"""\n"""', "[" * 3000, "'\\'", "{a = " * 900 + "1" + "}" * 900,
    "[" * 900 + "]" * 900, '"\\u0000"', "1979-05-27T07:32:00Z",
)  # fmt: skip


@st.composite
def policies(draw: DrawFn) -> bytes:
    """A policy in which something may be wrong."""
    word, value = st.sampled_from(WORDS), st.sampled_from(VALUES)
    lines = []
    for _ in range(draw(st.integers(0, 4))):
        match draw(st.integers(0, 5)):
            case 0:
                lines.append(f"[{draw(word)}]")
            case 1:
                lines.append(f"{draw(word)} = {draw(value)}")
            case 2:
                lines.append(".".join(["a"] * draw(st.sampled_from((2, 30, 5000)))) + " = 1")
            case _:
                rule = ", ".join(f"{draw(word)} = {draw(value)}" for _ in range(draw(st.integers(0, 2))))
                lines.append(f"[{draw(word)}]\n{draw(word)} = {{{rule}}}")
    good = '[intruders]\nintruders_per_matrix = {warn = 0.5, fail = 2.0, source = "ours"}\n'
    return draw(damaged(st.just((good * draw(st.booleans()) + "\n".join(lines)).encode()), often=3))
