from pathlib import Path

import pytest

import diagnostics
from diagnostics import AuditCallback, intruder_dimensions, training_dynamics
from diagnostics.core.analysis import Result
from diagnostics.core.inputs import check_input_types, open_roles, tasks
from probes import CheckpointPair, CheckpointSeries
from probes.checkpoints.series import series_of
from probes.errors import InputError
from probes.text.rows import read_task, task_of

BUNDLED = Path(diagnostics.__file__).parent / "bundled"

TEXT = '{"text": "a"}\n{"text": "b"}\n'


def write(tmp_path, name, text=TEXT):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_a_file_is_recorded_with_its_rows_and_fingerprint(tmp_path):
    path = write(tmp_path, "rows.jsonl")
    (rows,) = open_roles({"task": [path], "keep": []})["task"]
    fingerprint = read_task(path).fingerprint
    assert rows.describe() == {"name": "rows", "ref": path, "fingerprint": fingerprint, "rows": 2}


def test_a_limit_holds_for_every_file(tmp_path):
    path = write(tmp_path, "rows.jsonl")
    opened = open_roles({"task": [path], "keep": [path]}, limit=1)
    assert [opened[role][0].describe()["rows"] for role in ("task", "keep")] == [1, 1]


def test_roles_without_a_file_are_left_out(tmp_path):
    path = write(tmp_path, "rows.jsonl")
    assert list(open_roles({"task": [], "keep": [path], "ood": []})) == ["keep"]


def test_an_ood_file_may_be_given_a_name(tmp_path):
    path = write(tmp_path, "rows.jsonl")
    named, plain = open_roles({"ood": [f"code={path}", path]})["ood"]
    assert (named.name, plain.name) == ("code", "rows")
    assert named.task.ref == plain.task.ref == path


def test_a_file_whose_own_name_has_an_equals_sign_is_found(tmp_path):
    path = write(tmp_path, "a=b.jsonl")
    rows, named = open_roles({"ood": [path, f"code={path}"]})["ood"]
    assert (rows.name, named.name) == ("a=b", "code")


def test_one_name_twice_in_a_role_is_refused(tmp_path):
    paths = [write(tmp_path, "rows.jsonl"), write(tmp_path, "rows.csv", "text\n1\n")]
    with pytest.raises(
        ValueError, match="--ood: two files are called 'rows'; give each a name, --ood NAME=F"
    ):
        open_roles({"ood": paths})


def test_the_same_rows_in_and_out_of_distribution_are_refused_whatever_their_files_are_called(tmp_path):
    task, ood = write(tmp_path, "a.jsonl"), write(tmp_path, "b.csv", "text\na\nb\n")
    with pytest.raises(ValueError, match=r"--task .*a.jsonl and --ood new=.*b.csv hold the same rows"):
        open_roles({"task": [task], "ood": [f"new={ood}"]})


def test_a_bad_file_is_refused_with_its_line_and_field(tmp_path):
    with pytest.raises(ValueError, match=r'rows.jsonl:3: "text" is a whole number \(1\)'):
        open_roles({"task": [write(tmp_path, "rows.jsonl", TEXT + '{"text": 1}\n')]})


def test_a_missing_file_is_refused_with_its_option():
    with pytest.raises(ValueError, match=r"--guard nowhere.jsonl: there is no such file"):
        open_roles({"guard": ["nowhere.jsonl"]})


def test_a_role_called_from_python_may_be_a_task_a_file_texts_or_several_by_name(tmp_path):
    path = write(tmp_path, "rows.jsonl")
    in_memory = task_of(["a"], ref="made")
    assert list(tasks(path, "task")) == ["rows"]
    assert tasks(in_memory, "task") == {"made": in_memory}
    assert [row.text for row in tasks(["a", "b"], "ood")["ood"].rows] == ["a", "b"]
    several = tasks({"file": path, "texts": [{"text": "c", "group": "g"}]}, "ood")
    assert [(name, task.rows[0].text) for name, task in several.items()] == [("file", "a"), ("texts", "c")]
    with pytest.raises(ValueError, match="ood is empty; give a task, or several by name"):
        tasks({}, "ood")


@pytest.mark.parametrize("kind", [Path, str])
def test_a_list_of_paths_is_read_as_files_and_never_as_texts(tmp_path, kind):
    first = write(tmp_path, "first.jsonl")
    second = write(tmp_path, "second.jsonl", '{"text": "c"}\n')
    given_files = [kind(first), kind(second)]
    read = tasks(given_files, "task")
    assert {name: [row.text for row in task.rows] for name, task in read.items()} == {
        "first": ["a", "b"], "second": ["c"],
    }  # fmt: skip
    assert list(tasks(iter(given_files), "task")) == ["first", "second"]
    assert tasks({"both": given_files[:1]}, "task")["both"].ref == first
    with pytest.raises(InputError, match="both: is a list of 2 files; give each a name of its own"):
        tasks({"both": given_files}, "task")
    # A file that is not there is no text either.
    with pytest.raises(InputError, match=r"gone\.jsonl: there is no such file"):
        tasks([kind(tmp_path / "gone.jsonl")], "task")
    with pytest.raises(InputError, match=r"'.*first\.jsonl' is a file and 'some text' is none; give a list"):
        tasks([kind(first), "some text"], "task")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(InputError, match="task: two files are called 'first'"):
        tasks([kind(first), kind(write(other, "first.jsonl"))], "task")


def test_texts_that_speak_of_files_stay_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = ["Open rows.csv", "x" * 10000, "", "~", "a\nb.jsonl", "docs", "NUL\0byte", "~nobody/x"]
    (tmp_path / "docs").mkdir()
    assert [row.text for row in tasks(texts, "task")["task"].rows] == texts


def test_what_is_no_source_of_rows_is_named_by_its_type():
    with pytest.raises(InputError, match="rows are a int; give a file, a list of texts or a task"):
        tasks(3, "task")


# --- inputs of another type ---


@pytest.fixture(scope="module")
def pair():
    return CheckpointPair(BUNDLED / "base", BUNDLED / "full")


def test_a_tuple_in_the_place_of_a_pair_is_refused_with_the_call_that_makes_one():
    with pytest.raises(InputError, match=r"^intruders: pair is a tuple; it takes a CheckpointPair: Check"):
        intruder_dimensions((BUNDLED / "base", BUNDLED / "full"))


def test_a_pair_in_the_place_of_a_series_is_refused_with_the_list_of_its_two_ends(pair):
    message = r"^dynamics: series is a CheckpointPair; it takes .*: \[pair\.base, pair\.tuned\]$"
    with pytest.raises(InputError, match=message):
        training_dynamics(pair)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("pair", None, "None"), ("pair", "base", "a str"), ("series", 3, "a int"), ("series", {}, "a dict")],
)
def test_what_was_given_is_named_by_its_type(name, value, kind):
    with pytest.raises(InputError, match=f"^angles: {name} is {kind}; it takes a Checkpoint"):
        check_input_types("angles", {name: value})


def test_pairs_and_all_that_makes_a_series_are_taken(pair, register):
    calls = []

    def measure(pair, series, task):
        calls.append((pair, [checkpoint.ref for checkpoint in series_of(series).checkpoints], task))
        return Result(metrics={}, tables={})

    angles = register("angles", measure)
    base, tuned = pair.base.ref, pair.tuned.ref
    for series, refs in (
        (CheckpointSeries([pair.base, pair.tuned]), [base, tuned]),
        ([pair.base, pair.tuned], [base, tuned]),
        ((BUNDLED / "base",), [base]),
        (BUNDLED / "base", [base]),
        (iter([pair.base, pair.tuned]), [base, tuned]),  # the check reads nothing of it
    ):
        angles(pair, series, 3)  # whether 3 is a task is not asked here
        assert calls.pop() == (pair, refs, 3)


def test_a_callback_takes_one_file_as_it_is(tmp_path):
    path = write(tmp_path, "task.jsonl")
    callback = AuditCallback(tmp_path / "audit", only="sparsification", task=path)
    assert [rows.ref for rows in callback.rows["task"]] == [path]
