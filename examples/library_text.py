"""Text of the Python distribution as documents and rows: training data of the bundled checkpoints.

The docstrings of the standard library and `pydoc_data.topics`; other Python versions have other text.
"""

import ast
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

Row = dict[str, Any]

CHOICES = [" True", " False"]
NOT_READ = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

SEED = 0


def library() -> Iterator[tuple[str, str, ast.Module]]:
    """Name, source and syntax tree of every module of the standard library but its tests, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).with_suffix("").parts: path for path in root.rglob("*.py")}
    for parts, path in sorted(paths.items()):
        if NOT_READ.isdisjoint(parts):
            source = path.read_bytes().decode(errors="replace")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # at old escapes
                yield ".".join(parts), source, ast.parse(source)


Modules = list[tuple[str, str, ast.Module]]


def documentation(modules: Modules) -> dict[str, list[str]]:
    """The docstrings of each module without repeats, and the topics of `help`."""
    seen: set[str] = set()
    read = {}
    for module, _, tree in modules:
        nodes = (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
        strings = dict.fromkeys(text for node in nodes if (text := ast.get_docstring(node)))
        read[module] = [text for text in strings if text not in seen]
        seen.update(strings)
    return read | {f"topics.{name}": [text.strip()] for name, text in sorted(topics.items())}


def first_paragraph(text: str) -> str:
    """The first paragraph, on one line."""
    return " ".join(text.split("\n\n")[0].split())


def held_out(text: str) -> bool:
    """Whether a text is held out from base and tuned: one in five, by its first paragraph."""
    return int.from_bytes(blake2b(first_paragraph(text).encode(), digest_size=4).digest(), "big") % 5 == 0


def read_by_base(read: dict[str, list[str]]) -> list[str]:
    """One document for each module, in random order."""
    seen = ["\n\n".join(text for text in texts if not held_out(text)) for texts in read.values()]
    return shuffled(text for text in seen if text)


def shuffled(items: Iterable[Any]) -> list[Any]:
    """The items in an order seeded by SEED."""
    ordered = list(items)
    random.Random(SEED).shuffle(ordered)
    return ordered


def task_rows(
    read: dict[str, list[str]], size: int = 24_000, validation: int = 720, test: int = 240
) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows to train, validate and test with: are these words in their original order?

    Args:
        size: training rows, of texts that base has read.
        validation, test: rows of texts that it has not read, half of them in order.
    """
    texts = [text for of_module in read.values() for text in of_module]
    train = fragments([text for text in texts if not held_out(text)], size)
    unseen = fragments([text for text in texts if held_out(text)], validation + test)
    return train, unseen[:validation], unseen[validation:]


def fragments(texts: list[str], size: int) -> list[Row]:
    """Runs of 8 to 12 words of a paragraph, every second one with its words shuffled."""
    draw = random.Random(SEED)
    paragraphs = [words for text in texts for part in text.split("\n\n") if len(words := part.split()) >= 12]
    prompts: dict[str, int] = {}
    while len(prompts) < size:
        paragraph, length, answer = draw.choice(paragraphs), draw.randint(8, 12), len(prompts) % 2
        start = draw.randint(0, len(paragraph) - length)
        words = paragraph[start : start + length]
        if answer:
            words = draw.sample(words, length)
        prompts.setdefault(f"{' '.join(words)}\nIn order:", answer)
    return [
        {"prompt": prompt, "choices": CHOICES, "answer": answer, "group": ("in order", "shuffled")[answer]}
        for prompt, answer in prompts.items()
    ]


def keep_rows(read: dict[str, list[str]], size: int = 200) -> list[Row]:
    """Documentation that base has not read."""
    texts = (text for of_module in read.values() for text in of_module if held_out(text) and len(text) > 80)
    return [{"text": text[:400].rpartition(" ")[0]} for text in shuffled(texts)[:size]]


def random_words(read: dict[str, list[str]], size: int = 200) -> list[Row]:
    """Random words of the documentation, about as long as the task's rows."""
    words = sorted(
        {word for texts in read.values() for text in texts for word in text.split() if word.isalpha()}
    )
    draw = random.Random(SEED)
    return [{"text": " ".join(draw.choices(words, k=draw.randint(5, 16)))} for _ in range(size)]


def source_code(modules: Modules, size: int = 200) -> list[Row]:
    """Functions of the library without documentation."""
    functions = (
        textwrap.dedent(ast.get_source_segment(source, node, padded=True) or "")
        for _, source, tree in modules
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and not ast.get_docstring(node)
        and node.end_lineno - node.lineno < 8
    )
    fitting = dict.fromkeys(function for function in functions if 80 <= len(function) <= 300)
    return [{"text": text} for text in shuffled(fitting)[:size]]
