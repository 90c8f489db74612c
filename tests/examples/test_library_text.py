"""The text that the bundled checkpoints are trained on: what is read, held out and asked."""

import ast
import json
import textwrap
from pathlib import Path

import library_text as text
import pytest

import diagnostics

BUNDLED = Path(diagnostics.__file__).parent / "bundled"


def module(name: str, source: str) -> tuple[str, str, ast.Module]:
    return name, source, ast.parse(source)


def documented(name: str, count: int) -> tuple[str, str, ast.Module]:
    """A module of functions, each with a documentation string of its own."""
    functions = (f'def f{i}():\n    """What number {i} of {name} is good for."""\n' for i in range(count))
    return module(name, "\n".join(functions))


def test_documentation_is_read_of_modules_classes_and_functions_and_not_of_other_strings():
    source = (
        '"""Module."""\nclass C:\n    """Class."""\n    def f(self):\n        """Method."""\nx = "Value."\n'
    )
    assert text.documentation([module("m", source)])["m"] == ["Module.", "Class.", "Method."]


def test_a_text_that_two_modules_share_is_read_once():
    read = text.documentation([module("a", '"""Shared."""'), module("b", '"""Shared."""')])
    assert (read["a"], read["b"]) == (["Shared."], [])


def test_nothing_that_is_held_out_reaches_the_base():
    read = text.documentation([documented("tkinter", 200)])
    seen = "\n".join(text.read_by_base({"tkinter": read["tkinter"]}))
    held = [passage for passage in read["tkinter"] if text.held_out(passage)]
    assert 20 <= len(held) <= 60  # one in five of 200: 40, six standard deviations of 5.7 apart from 0
    assert not any(passage in seen for passage in held)
    assert all(passage in seen for passage in read["tkinter"] if passage not in held)


def test_texts_with_the_same_first_paragraph_are_held_out_together():
    # Else the base would have read what a held-out row asks about.
    for i in range(20):
        assert text.held_out(f"Paragraph {i}.") == text.held_out(f"Paragraph\n{i}.\n\n  More.")


def test_task_rows_are_divided_by_what_is_held_out_and_balanced():
    words = [f"w{i}" for i in range(4000)]
    read = {"m": [" ".join(words[20 * i : 20 * i + 20]) for i in range(200)]}
    train, validation, test = text.task_rows(read, size=100, validation=60, test=20)
    assert [len(rows) for rows in (train, validation, test)] == [100, 60, 20]
    assert [row["answer"] for row in test] == [0, 1] * 10
    unseen = {word for passage in read["m"] if text.held_out(passage) for word in passage.split()}
    for rows, held in ((train, False), (validation + test, True)):
        for row in rows:
            assert all((word in unseen) == held for word in row["prompt"].split("\n")[0].split())


def test_rows_in_order_are_as_they_were_written_and_the_others_are_the_same_words_shuffled():
    words = [f"w{i:02}" for i in range(40)]
    for row in text.fragments([" ".join(words)], 50):
        asked = row["prompt"].removesuffix("\nIn order:").split()
        assert 8 <= len(asked) <= 12
        assert (asked == sorted(asked)) == (row["answer"] == 0)
        assert int(max(asked)[1:]) - int(min(asked)[1:]) == len(asked) - 1


def test_source_code_keeps_its_layout_and_leaves_out_what_has_documentation():
    long = "    y = 1\n" * 5
    body = textwrap.indent(long + "    return 'a quite long string, so long'\n", "    ")
    source = f"class C:\n    def f(self):\n{body}"
    documented_too = f'def g():\n    """Text."""\n{long}    return "a quite long string, so long, so long"\n'
    rows = text.source_code([module("m", source + documented_too)])
    assert len(rows) == 1
    assert rows[0]["text"].startswith("def f(self):\n    y = 1\n")


@pytest.mark.parametrize("name", ["task", "keep", "ood-words", "ood-code"])
def test_the_bundled_rows_are_whole_and_name_no_place_of_a_machine(name: str):
    rows = [json.loads(line) for line in (BUNDLED / f"{name}.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) >= 200
    for row in rows:
        assert set(row) == ({"prompt", "choices", "answer", "group"} if name == "task" else {"text"})
        assert all(value for key, value in row.items() if key != "answer")
    prompts = [row.get("prompt") or row["text"] for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert not any(prefix in prompt for prompt in prompts for prefix in ("/home/", "/root/", "/tmp/", "C:\\"))


def test_the_bundled_task_rows_are_balanced_and_say_what_is_right():
    rows = [json.loads(line) for line in (BUNDLED / "task.jsonl").read_text("utf-8").splitlines()]
    assert {row["group"]: row["answer"] for row in rows} == {"in order": 0, "shuffled": 1}
    assert sum(row["answer"] for row in rows) == len(rows) // 2
    assert all(row["choices"] == [" True", " False"] for row in rows)
