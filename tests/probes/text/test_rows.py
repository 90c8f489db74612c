"""Files of rows are read whole and in order, or refused with file, line and field."""

import csv
import inspect
import io
import json
import re
import string
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.cli.options import run_options
from probes.errors import InputError
from probes.text.rows import ALLOWED, SHAPES, Row, class_ids, read_task, task_of

ROWS = {
    "text": [{"text": "one"}, {"text": ""}],
    "completion": [
        {"prompt": "2 + 2 =", "completion": " 4"},
        {"prompt": "", "completion": "x", "group": "g"},
    ],
    "choices": [{"prompt": "Is it?", "choices": [" yes", " no"], "answer": 1}],
    "label": [{"text": "good", "label": "positive"}, {"text": "bad", "label": 0}],
}
# Any text that UTF-8 can write: no lone surrogates.
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)
WORD = st.text(st.characters(codec="utf-8", categories=["L"]), min_size=1, max_size=5)


@pytest.fixture
def write(tmp_path):
    """Writes a file: `write(name, *lines)`, bytes as they are."""

    def make(name, *lines):
        path = tmp_path / name
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
        return path

    return make


def dumped(rows):
    """Rows as lines of JSON."""
    return [json.dumps(row) for row in rows]


@pytest.mark.parametrize("shape", ROWS)
def test_each_shape_is_told_by_its_fields(write, shape):
    path = write("task.jsonl", *dumped(ROWS[shape]))
    task = read_task(path)
    assert task.shape == shape
    assert task.ref == str(path)
    for number, (row, fields) in enumerate(zip(task.rows, ROWS[shape], strict=True), start=1):
        expected = {**fields, "choices": tuple(fields["choices"])} if "choices" in fields else fields
        assert row == Row(number=number, **expected)


def test_fields_that_are_none_of_ours_are_passed_over(write):
    path = write("task.jsonl", '{"id": 7, "text": "one", "meta": {"a": [1]}, "group": null}')
    assert read_task(path).rows == (Row(number=1, text="one"),)


def test_empty_lines_count_as_lines_but_not_as_rows(write):
    path = write("task.jsonl", "", '{"text": "one"}', "   ", "\t", '{"text": "two"}', "")
    assert [(row.number, row.text) for row in read_task(path).rows] == [(2, "one"), (5, "two")]


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(write):
    lines = dumped(ROWS["label"])
    plain = read_task(write("plain.jsonl", *lines))
    windows = read_task(write("windows.jsonl", b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n"))
    assert windows.rows == plain.rows
    assert windows.fingerprint == plain.fingerprint


def test_line_separators_within_a_text_do_not_end_its_line(write):
    path = write(
        "task.jsonl", json.dumps({"text": "a\u2028b\x85c\x0bd"}, ensure_ascii=False), '{"text": "e"}'
    )
    assert [row.text for row in read_task(path).rows] == ["a\u2028b\x85c\x0bd", "e"]


@pytest.mark.parametrize("file", ["empty.jsonl", "empty.csv"])
@pytest.mark.parametrize("content", ["", "\n\n", "\r\n", "\ufeff"])
def test_a_file_without_rows_is_refused(write, file, content):
    path = write(file, content)
    with pytest.raises(ValueError, match=rf"{file}: holds no rows; a row has fields, such as \"text\"$"):
        read_task(path)


def test_a_csv_file_with_nothing_but_a_header_is_refused(write):
    with pytest.raises(ValueError, match=r"task\.csv: holds no rows; a row has fields, such as \"text\"$"):
        read_task(write("task.csv", "text,label", ""))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not JSON: .*; each line is one object"),
        ("text", "not JSON: Expecting value"),
        ("[" * 100_000, "not JSON: "),
        (b'{"text": "\xff"}', r"not UTF-8 text \(byte 10 of the line\)"),
        ('["a"]', r"a row is an object such as \{\"text\": …\}, and this is a list \(\[\"a\"\]\)"),
        ("3", r"and this is a whole number \(3\)"),
        ("null", "and this is null"),
        ("{}", "this one has no field"),
        ('{"words": "a"}', 'this one has "words"$'),
        (json.dumps(dict.fromkeys("abcdefghij", 1)), '"g" and "h" and 2 more$'),
        ('{"messages": []}', r'this one has "messages"; write its turns as \{"prompt", "completion"\}'),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "write its prompt and its chosen answer as"),
        ('{"image": "a.png", "class": 1}', 'this one has "image" and "class"; images are not read'),
        ('{"prompt": "a"}', 'this one has "prompt"'),
        ('{"text": "a", "prompt": "b"}', 'this one has "text" and "prompt"'),
        ('{"completion": "a", "id": 3}', 'the row lacks "prompt"; this one has "completion" and "id"'),
        ('{"prompt": "a", "choices": ["b", "c"]}', 'the row lacks "answer"'),
        ('{"answer": 0}', 'the row lacks "prompt" and "choices"'),
        ('{"label": "a"}', 'the row lacks "text"'),
        ('{"text": 3}', r'"text" is a whole number \(3\); it is a string'),
        ('{"text": null}', '"text" is null; it is a string'),
        ('{"text": ["a"]}', r'"text" is a list \(\["a"\]\); it is a string'),
        ('{"text": {"a": 1}}', r'"text" is an object \(\{"a": 1\}\); it is a string'),
        ('{"text": "a", "group": 1}', r'"group" is a whole number \(1\); it is a string'),
        ('{"text": "a", "label": 1.5}', r'"label" is a number \(1.5\); it is a name or a whole number'),
        ('{"text": "a", "label": true}', r'"label" is true or false \(true\); it is a name'),
        ('{"text": "a", "label": ""}', '"label" is empty'),
        ('{"prompt": "a", "completion": ""}', '"completion" is empty'),
        ('{"text": "a\\ud83d"}', r'"text" has half a character, \\ud83d'),
        ('{"prompt": "a", "choices": "bc", "answer": 0}', r'"choices" is a string \("bc"\); it is a list'),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', '"choices" has 1 of them'),
        ('{"prompt": "a", "choices": ["b", 3], "answer": 0}', r'"choices\[1\]" is a whole number \(3\)'),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', r'"choices\[1\]" is empty'),
        ('{"prompt": "a", "choices": ["b", "c", "d"], "answer": 3}', '"answer" is 3 but there are 3 choices'),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": -1}', '"answer" is -1 but there are 2 choices'),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "0"}', r'"answer" is a string \("0"\)'),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', '"answer" is true or false'),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 1.0}', '"answer" is a number'),
    ],
)
def test_a_bad_line_is_named_with_its_field(write, line, message):
    path = write("task.jsonl", "", line, '{"text": "fine"}')
    with pytest.raises(ValueError, match=rf"task\.jsonl:2: .*{message}"):
        read_task(path)


def test_the_message_says_which_shapes_there_are(write):
    with pytest.raises(ValueError, match="a row is one of ") as error:
        read_task(write("task.jsonl", '{"words": "a"}'))
    assert ALLOWED in str(error.value)
    for fields in (
        '{"text"}',
        '{"prompt", "completion"}',
        '{"prompt", "choices", "answer"}',
        '{"text", "label"}',
    ):
        assert fields in str(error.value)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"text": "a", "label": 1}, {"text": "b"}, 'the row lacks "label"'),
        ({"text": "a"}, {"text": "b", "label": 1}, 'the row has "label", which the rows before it lack'),
        ({"prompt": "a", "completion": "b"}, {"text": "c"}, 'the row lacks "prompt" and "completion"'),
    ],
)
def test_a_row_of_another_shape_than_the_first_is_refused(write, first, second, message):
    with pytest.raises(ValueError, match=rf"task\.jsonl:2: {message}"):
        read_task(write("task.jsonl", *dumped([first, second])))


# --- CSV ---------------------------------------------------------------------------------------------------


def test_csv_cells_hold_quotes_commas_and_line_breaks(write):
    path = write("task.csv", "label,text,note", 'a,"one, ""two""\nthree",x', "", 'b,four,"', '"')
    task = read_task(path)
    assert task.shape == "label"
    # The second row begins on line 5, after a row of two lines and an empty one.
    assert [(row.number, row.text, row.label) for row in task.rows] == [
        (2, 'one, "two"\nthree', "a"),
        (5, "four", "b"),
    ]


def test_csv_and_jsonl_files_of_one_content_have_one_fingerprint(write):
    choices = write(
        "task.csv", "prompt,choices,answer,group",
        'Is it?,"["" yes"", "" no""]",1,', 'Or?,"[""a"", ""b""]",0,g',
    )  # fmt: skip
    rows = [*ROWS["choices"], {"prompt": "Or?", "choices": ["a", "b"], "answer": 0, "group": "g"}]
    assert read_task(choices).fingerprint == read_task(write("task.jsonl", *dumped(rows))).fingerprint


@pytest.mark.parametrize(
    ("cell", "label"), [("3", 3), ("-1", -1), ("0", 0), ("03", "03"), ("1.0", "1.0"), ("x", "x")]
)
def test_whole_numbers_in_a_csv_label_are_numbers(write, cell, label):
    assert read_task(write("task.csv", "text,label", f"a,{cell}")).rows[0].label == label


def test_a_text_longer_than_the_csv_modules_limit_is_read(write):
    before = csv.field_size_limit()
    long = "x" * (before + 1)
    assert read_task(write("task.csv", "text", long)).rows[0].text == long
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["text,label", "a,1", "b"], "3: 1 fields, and the header has 2; texts with commas"),
        (["text,label", "a,b,c"], "2: 3 fields, and the header has 2"),
        (["text,label", 'a,"b'], "2: not CSV: unexpected end of data"),
        (["text,label", '"a"b,c'], "2: not CSV: ',' expected after '\"'"),
        (["text,text", "a,b"], '1: the header has "text" twice'),
        (["words", "a"], '2: a row is one of .* this one has "words"'),
        (
            ["", "text;label", "a;1"],
            '2: semicolons seem to divide its columns "text" and "label"; save it with',
        ),
        (['"Text";"Class"', '"a";"b"'], '1: semicolons seem to divide its columns "Text" and "Class"'),
        (["prompt\tcompletion", "a\tb"], '1: tabs seem to divide its columns "prompt" and "completion"'),
        (["te\rxt", "a"], "1: not CSV: new-line character seen in unquoted field"),
        (["text|group", "a|b"], '1: bars seem to divide its columns "text" and "group"'),
        (["prompt,choices,answer", "a,b|c,0"], r'2: "choices" is a string \("b|c"\); it is a list of texts'),
        (["prompt,choices,answer", 'a,"[""b"", ""c""]",two'], r'2: "answer" is a string \("two"\)'),
        (["prompt,choices,answer", 'a,"[""b"", ""c""]",2'], '2: "answer" is 2 but there are 2 choices'),
        ([b"text,label", b"a,1", b"\xe9,2"], r"3: not UTF-8 text \(byte 0 of the line\)"),
    ],
)
def test_a_bad_line_of_a_csv_file_is_named(write, lines, message):
    with pytest.raises(ValueError, match=rf"task\.csv:{message}"):
        read_task(write("task.csv", *lines))


@given(st.lists(st.fixed_dictionaries({"text": TEXT, "label": WORD}), min_size=1, max_size=6))
def test_what_is_written_comes_back_from_either_kind_of_file(tmp_path_factory, rows):
    directory = tmp_path_factory.mktemp("rows")
    lines = directory / "task.jsonl"
    lines.write_text("\n".join(dumped(rows)), encoding="utf-8", newline="")
    cells = directory / "task.csv"
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, ["text", "label"], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    cells.write_bytes(buffer.getvalue().encode())
    for path in (lines, cells):
        task = read_task(path)
        assert [{"text": row.text, "label": row.label} for row in task.rows] == rows
        assert task.fingerprint == task_of(rows).fingerprint


# --- limits, fingerprints, memory --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["task.jsonl", "task.csv"])
def test_a_limit_reads_the_first_rows_and_does_not_look_at_the_others(write, name):
    good = ["", "one", "", "two"] if name == "task.csv" else ["", '{"text": "one"}', "", '{"text": "two"}']
    header = ["text"] if name == "task.csv" else []
    path = write(name, *header, *good, 'bad"",,{')
    assert [row.text for row in read_task(path, limit=2).rows] == ["one", "two"]
    with pytest.raises(ValueError, match=f"{name}:{len(header) + 5}: "):
        read_task(path, limit=3)


def test_a_limit_beyond_the_end_takes_all_rows():
    assert task_of(["a", "b"], limit=10) == task_of(["a", "b"])


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_no_rows_is_refused(limit):
    with pytest.raises(ValueError, match=f"rows: the limit is {limit}; it counts rows and is at least 1"):
        task_of(["a"], limit=limit)


def test_the_fingerprint_is_of_the_rows_that_are_used():
    full = task_of(["a", "b", "c"])
    assert task_of(["a", "b", "z"], limit=2).fingerprint == task_of(["a", "b"]).fingerprint
    others = [
        task_of(["a", "b"]),
        task_of(["a", "c", "b"]),
        task_of(["ab", "", "c"]),
        task_of([{"text": text, "group": "g"} for text in "abc"]),
        task_of([{"text": text, "label": "x"} for text in "abc"]),
        task_of([{"text": text, "label": 1} for text in "abc"]),
        task_of([{"text": text, "label": "1"} for text in "abc"]),
        task_of([{"prompt": text, "completion": "x"} for text in "abc"]),
    ]
    assert len({full.fingerprint, *(task.fingerprint for task in others)}) == 9


def test_rows_in_memory_are_texts_or_mappings_and_named_by_their_place():
    assert task_of(["a", {"text": "b", "group": "g"}]).rows == (
        Row(number=1, text="a"),
        Row(number=2, text="b", group="g"),
    )
    assert task_of(iter(["a"]), ref="texts").ref == "texts"
    with pytest.raises(ValueError, match=r'^held out:2: "text" is a whole number \(3\); it is a string$'):
        task_of(["a", {"text": 3}], ref="held out")
    with pytest.raises(ValueError, match=r"^rows: holds no rows; a row has fields, such as \"text\"$"):
        task_of([])


def test_too_few_rows_for_what_is_asked_are_refused():
    task = task_of(["a"], ref="near.jsonl")
    assert task.at_least(1) is task
    with pytest.raises(
        ValueError, match=r"near\.jsonl: has 1 row, and an AUROC needs at least 2; give it more"
    ):
        task.at_least(2, "an AUROC")


def test_rows_are_named_by_file_and_line(write):
    task = read_task(write("task.jsonl", "", '{"text": "one"}'))
    assert task.where(0) == f"{task.ref}:2"


# --- labels ------------------------------------------------------------------------------------------------


def labelled(*labels):
    return task_of([{"text": "a", "label": label} for label in labels], ref="task.jsonl")


STARS = ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        (["bad", "good", "bad"], ["bad", "good"], [0, 1, 0]),
        ([1, 0, 1], ["bad", "good"], [1, 0, 1]),
        ([1, 0], ["LABEL_0", "LABEL_1"], [1, 0]),
        (["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"], [1, 0]),
        # A number is a number, if it can be one; none has the number 5.
        ([0, 3, 4], STARS, [0, 3, 4]),
        ([4, 3], STARS, [4, 3]),
        ([1, 3, 5], STARS, [0, 2, 4]),
        # A text is no number.
        (["1", "2"], STARS, [0, 1]),
        # Both readings are the same.
        ([0, 2, 1], ["0", "1", "2"], [0, 2, 1]),
        (["Good ", "BAD"], ["bad", "good"], [1, 0]),
        # Two names that differ in case alone.
        (["a", "A"], ["A", "a"], [1, 0]),
    ],
)
def test_labels_of_a_file_are_all_names_or_all_numbers(labels, names, classes):
    assert class_ids(labelled(*labels), names) == classes


def test_a_label_that_is_the_name_of_a_class_is_not_its_number():
    # A model whose classes are called "1" and "0", in this order.
    assert class_ids(labelled(1, "0"), ["1", "0"]) == [0, 1]


@pytest.mark.parametrize(("labels", "line"), [((1, 2, 3, 4), 1), ((4, 1), 1), ((1,), 1)])
def test_labels_that_can_be_read_both_ways_are_asked_about(labels, line):
    message = rf"task\.jsonl:{line}: \"label\" is {labels[0]}: the class called '{labels[0]}', or class"
    with pytest.raises(InputError, match=message):
        class_ids(labelled(*labels), STARS)


def test_names_and_numbers_in_one_file_are_refused():
    with pytest.raises(InputError, match=r"task\.jsonl:2: \"label\" is 1, the number of a class"):
        class_ids(labelled("bad", 1, "good"), ["bad", "good"])
    with pytest.raises(InputError, match=r"task\.jsonl:3: \"label\" is 'bad', the name of a class"):
        class_ids(labelled(0, 1, "bad"), ["bad", "good"])


@given(st.data())
def test_labels_are_read_as_the_brute_force_reads_them(data):
    names = data.draw(
        st.permutations(
            [str(name) for name in range(data.draw(st.integers(0, 1)), data.draw(st.integers(2, 5)))]
        )
    )
    labels = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    readings = [
        [ids.get(label) for label in labels]
        for ids in ({int(name): i for i, name in enumerate(names)}, {i: i for i in range(len(names))})
    ]
    possible = [reading for reading in readings if None not in reading]
    asked = len(possible) == 2 and possible[0] != possible[1] and not {0, 1}.isdisjoint(labels)
    try:
        classes = class_ids(labelled(*labels), names)
    except InputError:
        assert asked or not possible
    else:
        assert not asked
        assert classes == possible[-1]


@pytest.mark.parametrize("label", ["ugly", 2, -1, "1"])
def test_a_label_that_the_model_does_not_know_is_named(label):
    task = task_of([{"text": "a", "label": "bad"}, {"text": "b", "label": label}], ref="task.jsonl")
    with pytest.raises(
        ValueError, match=rf"task\.jsonl:2: \"label\" is {label!r}, .* 2 labels are 'bad', 'good';"
    ):
        class_ids(task, ["bad", "good"])


def test_of_many_labels_the_message_shows_a_few():
    task = task_of([{"text": "a", "label": "?"}])
    with pytest.raises(ValueError, match="26 labels are 'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', …; give"):
        class_ids(task, list(string.ascii_lowercase))


# --- what is there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ref", ["missing.jsonl", "missing.csv", "missing", "far=missing:x.jsonl"])
def test_a_file_that_is_not_there_is_said_not_to_be(ref):
    with pytest.raises(
        ValueError, match=f"{ref}: there is no such file; a task is a .jsonl or .csv file, or hub"
    ):
        read_task(ref)


def test_a_directory_is_no_task(tmp_path):
    with pytest.raises(ValueError, match="is a directory; name a file in it, or a split of a data set, "):
        read_task(tmp_path)


@pytest.fixture
def splits(tmp_path, monkeypatch):
    """A data set in a directory: `train` with a column that is none of ours."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    directory = tmp_path / "data"
    directory.mkdir()
    rows = [{"text": f"row {i}", "label": i % 2, "picture": "x" * i} for i in range(5)]
    (directory / "train.jsonl").write_text("\n".join(dumped(rows)))
    yield directory
    datasets.enable_progress_bars()


def test_a_split_of_a_data_set_is_a_task(splits):
    task = read_task(f"{splits}:train", limit=3)
    assert [(row.number, row.text, row.label) for row in task.rows] == [
        (1, "row 0", 0),
        (2, "row 1", 1),
        (3, "row 2", 0),
    ]
    assert [row.text for row in read_task(f"{splits}:train[3:]").rows] == ["row 3", "row 4"]


def test_a_split_with_other_columns_or_none_at_all_is_refused(splits, tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    (words / "train.jsonl").write_text('{"words": "a"}')
    with pytest.raises(ValueError, match=r'words:train:1: a row is one of .* this one has "words"$'):
        read_task(f"{words}:train")
    with pytest.raises(ValueError, match=r'data:dev: neither a file nor a split .*Unknown split "dev"'):
        read_task(f"{splits}:dev")
    (splits / "train.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match=r"data:train: neither a file nor a split .*JSON parse error"):
        read_task(f"{splits}:train")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_parquet_or_arrow_file_is_a_split_of_its_directory(splits, tmp_path, suffix):
    from datasets import Dataset

    rows = [{"text": "one", "group": "a"}, {"text": "two", "group": None}]
    path = tmp_path / "table" / f"train.{suffix}"
    path.parent.mkdir()
    if suffix == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        table = Dataset.from_list(rows).data.table
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    assert read_task(f"{path.parent}:train").rows == (
        Row(number=1, text="one", group="a"), Row(number=2, text="two"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=rf"train\.{suffix}: is read as a split .* {path.parent}:train$"):
        read_task(path)


def test_a_data_set_that_cannot_be_reached_is_said_to_be():
    pytest.importorskip("datasets")
    for ref in ("nobody/nothing:train", "nobody/nothing/plain@main:train"):
        with pytest.raises(ValueError, match=f"{ref}: neither a file nor a split that can be loaded"):
            read_task(ref)


# --- what a stranger's file may hold ---


def test_a_header_of_many_equal_columns_is_refused_at_once(tmp_path):
    (tmp_path / "x.csv").write_text("," * 200_000 + "\n")
    with pytest.raises(ValueError, match=r'x\.csv:1: the header has "" twice'):
        read_task(tmp_path / "x.csv")


def test_a_column_named_in_two_lines_is_quoted_in_one(tmp_path):
    (tmp_path / "x.csv").write_text('"a\nb","a\nb"\n')
    with pytest.raises(ValueError, match=r'the header has "a\\nb" twice'):
        read_task(tmp_path / "x.csv")


@pytest.mark.parametrize("depth", [300, 900, 960, 990, 100_000])
def test_nesting_of_any_depth_is_refused(tmp_path, depth):
    (tmp_path / "x.jsonl").write_text('{"text": ' + "[" * depth + "]" * depth + "}\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: (\"text\" is a list|not JSON)"):
        read_task(tmp_path / "x.jsonl")


# --- the page ---

PAGE = Path(__file__).parents[3] / "docs" / "rows.md"
EXAMPLES = re.findall(r"```(jsonl|csv)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(("suffix", "content"), EXAMPLES)
def test_each_example_of_the_page_is_a_task(tmp_path, suffix, content):
    path = tmp_path / f"task.{suffix}"
    path.write_text(content, encoding="utf-8")
    task = read_task(path)
    assert len(task.rows) == len(content.splitlines()) - (suffix == "csv")
    # A format is another way to write the same rows.
    fields = [{name: value for name, value in vars(row).items() if value is not None} for row in task.rows]
    assert task_of(fields).fingerprint == task.fingerprint


def test_the_page_shows_every_shape_every_format_groups_and_the_roles_of_the_command():
    shapes = {task_of([json.loads(text.splitlines()[0])]).shape for kind, text in EXAMPLES if kind == "jsonl"}
    assert shapes == set(SHAPES)
    assert {kind for kind, _ in EXAMPLES} == {"jsonl", "csv"}
    assert sum('"group"' in text or ",group" in text for _, text in EXAMPLES) == 2
    shown = set(re.findall(r"^\| `--(\w+) ", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert shown == {"task", "keep", "guard", "ood", "train"}
    assert shown <= set(inspect.signature(run_options).parameters)


def test_the_errors_on_the_page_are_those_of_such_files(write):
    filler = [json.dumps({"prompt": "a", "choices": ["b", "c", "d"], "answer": 0})] * 16
    answer = json.dumps({"prompt": "a", "choices": ["b", "c", "d"], "answer": 4})
    files = {
        "choices": ("task.jsonl", [*filler, answer]),
        "label": ("task.jsonl", ['{"sentence": "a", "label": 1}']),
        "csv": ("task.csv", ["text;label", "a;1"]),
    }
    (block,) = re.findall(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for (name, content), line in zip(files.values(), block.splitlines(), strict=True):
        with pytest.raises(ValueError, match=rf"{re.escape(line)}$"):
            read_task(write(name, *content))
