import pytest

from diagnostics.core.inputs import open_roles, tasks
from probes.text.rows import read_task, task_of

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
    made = task_of(["a"], ref="made")
    assert list(tasks(path, "task")) == ["rows"]
    assert tasks(made, "task") == {"made": made}
    assert [row.text for row in tasks(["a", "b"], "ood")["ood"].rows] == ["a", "b"]
    several = tasks({"file": path, "texts": [{"text": "c", "group": "g"}]}, "ood")
    assert [(name, task.rows[0].text) for name, task in several.items()] == [("file", "a"), ("texts", "c")]
    with pytest.raises(ValueError, match="ood is empty; give a task, or several by name"):
        tasks({}, "ood")
