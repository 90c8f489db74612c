"""Rows of text: JSONL and CSV files and dataset splits, checked field by field, without torch.

All rows of a task have one of four shapes. Errors name file, line and field. Users read `docs/rows.md`.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

from probes.errors import InputError, library_error
from probes.files.untrusted import one_line

Shape: TypeAlias = Literal["text", "completion", "choices", "label"]
NumberedRows: TypeAlias = Iterator[tuple[int, Mapping[str, Any]]]

SHAPES: dict[Shape, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "choices": ("prompt", "choices", "answer"),
    "label": ("text", "label"),
}
FIELDS = {field for fields in SHAPES.values() for field in fields}
ALLOWED = ", ".join("{" + ", ".join(f'"{field}"' for field in fields) + "}" for fields in SHAPES.values())

# Fields by which a row of another kind is recognised, and the way to give it.
OTHER_FIELDS = {
    "messages": 'write its turns as {"prompt", "completion"}',
    "chosen": 'write its prompt and its chosen answer as {"prompt", "completion"}',
    "image": "images are not read",
}
DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
TABLES = (".parquet", ".arrow")
# hub-dataset:split, where the data set may be org/name/configuration and may carry @revision
SPLIT = re.compile(r"(?P<name>[^:@]+)(?:@(?P<revision>[^:@]+))?:(?P<split>.+)")

JSON_NAMES = {
    str: "a string", bool: "true or false", int: "a whole number", float: "a number", list: "a list",
    dict: "an object", type(None): "null",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row; the fields that its shape lacks are None.

    Attributes:
        text: may be empty: nothing of it is scored, and a note counts such rows.
        prompt: may be empty; the completion or choice follows it without a space.
        answer: index of the right choice, from 0.
        label: name or number of a class.
        group: a name to break results down by.
        number: its line in the file, or its position in the split, from 1.

    >>> Row(number=1, prompt="2 + 2 =", completion=" 4").text is None
    True
    """

    number: int
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    choices: tuple[str, ...] | None = None
    answer: int | None = None
    label: str | int | None = None
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows of one shape.

    Attributes:
        ref: the reference that it was read from.
        shape: which fields the rows have.
        fingerprint: blake2b of the rows that were read, independent of the file's format.

    >>> task_of(["one text", "another"]).shape
    'text'
    """

    ref: str
    rows: tuple[Row, ...]
    shape: Shape
    fingerprint: str

    def where(self, index: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.ref}:{self.rows[index].number}"

    def at_least(self, count: int, what: str = "this") -> "Task":
        """The task itself; raises InputError if it has fewer rows."""
        if len(self.rows) < count:
            rows = "1 row" if len(self.rows) == 1 else f"{len(self.rows)} rows"
            raise InputError(f"{self.ref}: has {rows}, and {what} needs at least {count}; give it more")
        return self


def read_task(ref: str | Path, *, limit: int | None = None) -> Task:
    """Read and check a task.

    Args:
        ref: a .jsonl or .csv file, or `hub-dataset:split` for the datasets library: `org/name:test`,
            `org/name/configuration@revision:train`, or `directory:split`.
        limit: read this many rows from the start; later rows are not looked at.

    Raises:
        InputError: it is missing, empty or malformed; the message names the file, the line and the field.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> task = read_task(BUNDLED / "task.jsonl", limit=2)
    >>> task.shape, task.rows[0].answer
    ('choices', 0)
    """
    path = local(ref)
    if path.is_file() and path.suffix.lower() in TABLES:
        problem = "is read as a split of a data set; give the directory that it alone is in"
        raise InputError(f"{ref}: {problem}, {path.parent}:train")
    if path.is_file():
        return checked(str(ref), csv_rows(path) if path.suffix.lower() == ".csv" else json_rows(path), limit)
    if path.is_dir():
        raise InputError(f"{ref}: is a directory; name a file in it, or a split of a data set, {ref}:train")
    dataset = SPLIT.fullmatch(str(ref))
    if dataset is None or path.suffix.lower() in SUFFIXES:
        wanted = "a task is a .jsonl or .csv file, or hub-dataset:split"
        raise InputError(f"{ref}: there is no such file; {wanted}")
    return checked(str(ref), split_rows(str(ref), **dataset.groupdict()), limit)


def local(ref: str | Path) -> Path:
    """A reference as a path, which need not exist."""
    try:
        path = Path(ref).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, or a home that nobody has
        raise InputError(f"{ref}: there is no such file ({error})") from error
    return path


def task_of(rows: Iterable[str | Mapping[str, Any]], *, ref: str = "rows", limit: int | None = None) -> Task:
    """A task from rows in memory: mappings with the fields of a file's rows, or plain texts.

    Raises:
        InputError: as `read_task`, with the position of the row from 1 as its line.

    >>> task_of([{"prompt": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}]).rows[0].choices
    (' 4', ' 5')
    """
    fields = ({"text": row} if isinstance(row, str) else row for row in rows)
    return checked(ref, enumerate(fields, start=1), limit)


def class_ids(task: Task, labels: Sequence[str]) -> list[int]:
    """The class of each row: all labels of a task are names of the model's classes, or all are their numbers.

    A string is a name; it may differ from the model's in case and in spaces around it. A whole number counts
    from 0; if some of the task's exceed the classes, all are names.

    Args:
        labels: the names of the model's classes, in order.

    Raises:
        InputError: a label that the model does not know, or labels that can be read both ways.

    >>> rows = [{"text": "ab", "label": "Yes"}, {"text": "cd", "label": "no"}]
    >>> class_ids(task_of(rows), ["no", "yes"])
    [1, 0]
    """
    names, numbers = _by_name(task, labels), _by_number(task, labels)
    if None in names and None in numbers:
        raise _unreadable(task, labels, names, numbers)
    if None in numbers:
        return [class_id for class_id in names if class_id is not None]
    # They begin as the names do: without a 0 they may count from 1, and a class may be called 0.
    if {0, 1} & set(numbers) and None not in names and names != numbers:
        first = next(i for i, name in enumerate(names) if name != numbers[i])
        label = task.rows[first].label
        called = [repr(labels[ids[first] or 0]) for ids in (names, numbers)]
        raise InputError(
            f'{task.where(first)}: "label" is {label}: the class called {called[0]}, or class number '
            f"{label}, called {called[1]}? Every label of the file can be read both ways; write the "
            f'names as strings in a .jsonl file, "label": "{label}"'
        )
    return [class_id for class_id in numbers if class_id is not None]


def _unreadable(
    task: Task, labels: Sequence[str], names: Sequence[int | None], numbers: Sequence[int | None]
) -> InputError:
    """The error for labels that are neither all names nor all numbers."""
    kinds = list(zip(names, numbers, strict=True))
    if (None, None) in kinds:
        first = kinds.index((None, None))
        listed = ", ".join(map(repr, labels[:8])) + (", …" if len(labels) > 8 else "")
        return InputError(
            f'{task.where(first)}: "label" is {task.rows[first].label!r:.80}, which the model does not know; '
            f"its {len(labels)} labels are {listed}; give one of them, or its number from 0"
        )
    first = names.index(None) if names[0] is not None else numbers.index(None)
    kind, others = ("number", "names") if names[0] is not None else ("name", "numbers")
    return InputError(
        f'{task.where(first)}: "label" is {task.rows[first].label!r:.80}, the {kind} of a class, and the '
        f"rows before it have {others}; give all by name, or all by number"
    )


def by_number(task: Task, labels: Sequence[str]) -> bool:
    """Whether the labels of a task are the numbers of classes, and no names."""
    return None not in _by_number(task, labels)


def _by_name(task: Task, labels: Sequence[str]) -> list[int | None]:
    """The class of each row if labels are names; None where there is none of that name."""
    exact = {name: index for index, name in enumerate(labels)}
    texts = [str(row.label) for row in task.rows]
    folded = {name.strip().casefold(): index for name, index in exact.items()}
    if len(folded) == len(exact) and not all(text in exact for text in texts):
        return [folded.get(text.strip().casefold()) for text in texts]
    return [exact.get(text) for text in texts]


def _by_number(task: Task, labels: Sequence[str]) -> list[int | None]:
    """The class of each row if labels are numbers from 0; None where there is none of that number."""
    return [
        row.label if isinstance(row.label, int) and 0 <= row.label < len(labels) else None
        for row in task.rows
    ]


def checked(ref: str, numbered: NumberedRows, limit: int | None) -> Task:
    """The rows as a task."""
    if limit is not None and limit < 1:
        raise InputError(f"{ref}: the limit is {limit}; it counts rows and is at least 1")
    shape: Shape | None = None
    rows = []
    content = hashlib.blake2b(digest_size=16)
    with one_line(ref):
        for number, fields in islice(numbered, limit):
            try:
                shape = shape_of(fields, shape)
                row = row_of(fields, SHAPES[shape], number)
            except ValueError as error:
                raise InputError(f"{ref}:{number}: {error}") from error
            rows.append(row)
            content.update(json.dumps({**vars(row), "number": None}).encode() + b"\n")
    if shape is None:
        raise InputError(f'{ref}: holds no rows; a row has fields, such as "text"')
    return Task(ref=ref, rows=tuple(rows), shape=shape, fingerprint=content.hexdigest())


def shape_of(fields: Any, expected: Shape | None) -> Shape:
    """The shape of a row, by its fields; the rows before it have the expected one."""
    if not isinstance(fields, Mapping):
        raise InputError(f'a row is an object such as {{"text": …}}, and this is {described(fields)}')
    present = FIELDS & fields.keys()
    shape = next((shape for shape, needed in SHAPES.items() if present == set(needed)), None)
    if shape is not None and expected in (None, shape):
        return shape
    close = [shape for shape, needed in SHAPES.items() if present and present < set(needed)]
    close = [expected] if expected else close
    missing = [field for field in SHAPES[close[0]] if field not in present] if len(close) == 1 else []
    if missing:
        raise InputError(f"the row lacks {quoted(missing)}; {columns(fields)}")
    if expected:
        surplus = quoted(sorted(present - set(SHAPES[expected])))
        raise InputError(f"the row has {surplus}, which the rows before it lack; a task has one shape")
    hints = [hint for field, hint in OTHER_FIELDS.items() if field in fields]
    raise InputError("; ".join([f"a row is one of {ALLOWED}", columns(fields), *hints]))


def columns(fields: Mapping[str, Any]) -> str:
    """The fields of a row, for messages."""
    names = [str(name) for name in fields]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"this one has {quoted(names[:8])}{more}" if names else "this one has no field"


def row_of(fields: Mapping[str, Any], needed: Iterable[str], number: int) -> Row:
    """A row with each of its fields checked."""
    values = {field: fields[field] for field in needed}
    if fields.get("group") is not None:
        values["group"] = fields["group"]
    for field, value in values.items():
        if field == "choices":
            values[field] = choices_of(value)
        elif field == "answer":
            if type(value) is not int:
                wanted = "the number of the right choice, from 0"
                raise InputError(f'"answer" is {described(value)}; it is {wanted}')
        elif field == "label" and type(value) is int:
            continue
        else:
            values[field] = text_of(field, value)
    answer, choices = values.get("answer"), values.get("choices", ())
    if answer is not None and not 0 <= answer < len(choices):
        raise InputError(f'"answer" is {answer} but there are {len(choices)} choices; it counts from 0')
    return Row(number=number, **values)


def choices_of(value: Any) -> tuple[str, ...]:
    """Two or more texts."""
    if not isinstance(value, (list, tuple)):
        raise InputError(f'"choices" is {described(value)}; it is a list of texts')
    if len(value) < 2:
        raise InputError(f'"choices" has {len(value)} of them; a choice needs two or more')
    return tuple(text_of(f"choices[{index}]", choice) for index, choice in enumerate(value))


def text_of(field: str, value: Any) -> str:
    """A text that UTF-8 can encode; only "text" and "prompt" may be empty."""
    if not isinstance(value, str):
        wanted = "a name or a whole number" if field == "label" else "a string"
        raise InputError(f'"{field}" is {described(value)}; it is {wanted}')
    if not value and field not in ("text", "prompt"):
        raise InputError(f'"{field}" is empty')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise InputError(f'"{field}" has half a character, {half}, which is none by itself') from error
    return value


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a UTF-8 file, without a byte order mark, their ends kept."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 text (byte {error.start} of the line)"
                raise InputError(f"{path}:{number}: {problem}") from error


def json_rows(path: Path) -> NumberedRows:
    """The objects of a JSONL file, one a line; empty lines are skipped."""
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON: {error}; each line is one object") from error


def csv_rows(path: Path) -> NumberedRows:
    """The rows of a CSV file with a header line; empty lines are skipped.

    A cell of `choices` is a JSON list; whole numbers in `answer` and `label` are numbers.
    """
    refuse_delimiter(path)
    reader = csv.reader((line for _, line in lines(path)), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        # A module-wide setting that would refuse long texts; put back at once.
        longest = csv.field_size_limit(2**31 - 1)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{path}:{number}: not CSV: {error}") from error
        finally:
            csv.field_size_limit(longest)
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            if twice := [name for name, count in Counter(header).items() if count > 1]:
                raise InputError(f"{path}:{number}: the header has {quoted(twice[:1])} twice")
            continue
        if len(cells) != len(header):
            problem = f"{len(cells)} fields, and the header has {len(header)}"
            hint = "texts with commas or line breaks are put in double quotes"
            raise InputError(f"{path}:{number}: {problem}; {hint}")
        yield number, {name: from_cell(name, cell) for name, cell in zip(header, cells, strict=True)}


def refuse_delimiter(path: Path) -> None:
    """Raise InputError if another delimiter than the comma divides the header of a CSV file."""
    number, header = next(((number, line) for number, line in lines(path) if line.strip()), (0, ""))
    for delimiter, plural in DELIMITERS.items():
        if delimiter in header and "," not in header:
            names = [name.strip().strip('"') for name in header.split(delimiter, maxsplit=8)]
            problem = f"{plural} seem to divide its columns {quoted(names[:8])}"
            raise InputError(f"{path}:{number}: {problem}; save it with commas")


def from_cell(field: str, cell: str) -> Any:
    """The value of a cell of a CSV file."""
    if field in ("answer", "label") and re.fullmatch(r"0|-?[1-9][0-9]{0,17}", cell):
        return int(cell)
    if field == "choices":
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell  # refused as a string, with its line
    return None if field == "group" and not cell else cell


def split_rows(ref: str, name: str, revision: str | None, split: str) -> NumberedRows:
    """The rows of a split of a data set, on the hub, in its cache or in a directory."""
    import datasets

    parts = name.split("/")
    configuration = parts.pop() if len(parts) == 3 and not Path(name).is_dir() else None
    where = name if configuration is None else "/".join(parts)
    try:
        data = datasets.load_dataset(where, configuration, split=split, revision=revision)
    except Exception as error:
        reason = library_error(error.__cause__ or error)  # itself says only that something went wrong
        raise InputError(f"{ref}: neither a file nor a split that can be loaded ({reason})") from error
    wanted = [column for column in data.column_names if column in FIELDS | {"group"}]
    if not wanted:
        return iter([(1, dict.fromkeys(data.column_names))])
    # Other columns may hold pictures or sound, which take long to decode.
    return enumerate(iter(data.select_columns(wanted)), start=1)


def described(value: Any) -> str:
    """A value and its type, for messages."""
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        text = "…"
    kind = JSON_NAMES.get(type(value), type(value).__name__)
    return kind if value is None else f"{kind} ({text if len(text) <= 40 else text[:37] + '…'})"


def quoted(fields: Iterable[str]) -> str:
    """Names of fields, for messages."""
    return " and ".join(f'"{field}"' for field in fields)
