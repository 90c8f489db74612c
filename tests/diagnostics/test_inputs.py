import hashlib

import pytest

from diagnostics.inputs import open_roles


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_rows_are_counted_and_fingerprinted_and_empty_lines_are_not_rows(tmp_path):
    # A Unicode line separator does not end a line.
    text = '{"text": "a"}\n\n{"text": "b\\u2028c"}\n{"text": "d\u2028e"}\n'
    path = write(tmp_path, "rows.jsonl", text)
    (rows,) = open_roles({"task": [path], "keep": []})["task"]
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    assert rows.describe() == {"name": "rows", "ref": path, "fingerprint": digest, "rows": 3}


def test_a_quoted_line_break_in_a_csv_file_does_not_start_a_row(tmp_path):
    path = write(tmp_path, "rows.csv", 'prompt,completion\n"a\nb",c\nd,e\n')
    (rows,) = open_roles({"task": [path]})["task"]
    assert rows.rows == 2


def test_roles_without_a_file_are_left_out(tmp_path):
    path = write(tmp_path, "rows.jsonl", "{}")
    assert list(open_roles({"task": [], "keep": [path], "ood": []})) == ["keep"]


def test_an_ood_file_may_be_given_a_name(tmp_path):
    path = write(tmp_path, "rows.jsonl", "{}")
    named, plain = open_roles({"ood": [f"code={path}", path]})["ood"]
    assert (named.name, plain.name) == ("code", "rows")
    assert named.path == plain.path


def test_a_file_whose_own_name_has_an_equals_sign_is_found(tmp_path):
    (rows,) = open_roles({"ood": [write(tmp_path, "a=b.jsonl", "{}")]})["ood"]
    assert rows.name == "a=b"


def test_one_name_twice_in_a_role_is_refused(tmp_path):
    paths = [write(tmp_path, f"rows.{end}", text) for end, text in (("jsonl", "{}"), ("csv", "a\n1\n"))]
    with pytest.raises(
        ValueError, match="--ood: two files are called 'rows'; give each a name, --ood NAME=F"
    ):
        open_roles({"ood": paths})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"a": 1}\n{"a": \n', r"rows.jsonl:2: not JSON"),
        ("rows.jsonl", '{"a": 1}\n\n[1]\n', r"rows.jsonl:3: a row is an object such as"),
        ("rows.jsonl", "\n\n", r"rows.jsonl: holds no rows"),
        ("rows.csv", "a,b\n1,2\n3\n", r"rows.csv:3: not as many fields as the header has"),
        ("rows.csv", "a,b\n1,2,3\n", r"rows.csv:2: not as many fields as the header has"),
        ("rows.csv", 'a,b\n1,"2" 3\n', r"rows.csv:2: not CSV"),
        ("rows.csv", "a,b\n", r"rows.csv: holds no rows"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        open_roles({"task": [write(tmp_path, name, text)]})


def test_a_missing_file_is_refused_with_its_option():
    with pytest.raises(ValueError, match=r"--guard nowhere.jsonl: there is no such file"):
        open_roles({"guard": ["nowhere.jsonl"]})


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"rows.jsonl: not UTF-8 text \(byte 7\)"):
        open_roles({"task": [tmp_path / "rows.jsonl"]})
