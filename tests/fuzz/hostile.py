"""Malformed JSON and bytes: valid documents in which something is replaced, removed, doubled or damaged.

What JSON cannot say, Python's `dumps` does not write: marks inside of texts stand for it until `encoded`.
"""

import json
import math
import re
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

# Replaced by the directory that holds `inside` and `outside`.
HOME = "{HOME}"
# Places outside of the directory, as a path in a file may name them.
OUTSIDE = (
    "../outside/secret.safetensors",
    "../outside/secret.bin",
    "../outside/secret.parquet",
    "../outside",
    f"{HOME}/outside/secret.safetensors",
    f"{HOME}/outside/secret.json",
    "..\\outside\\secret.safetensors",
    "sub/../../outside/secret.safetensors",
    "./../outside/secret.json",
    "~/secret.safetensors",
    "~nobody-of-that-name/x",
    "file:///etc/passwd",
    "/dev/zero",
    "/proc/self/mem",
    "out.safetensors",
    "a/" * 2500 + "x.safetensors",
    "a" * 300 + ".safetensors",
    ".",
    "..",
    "/",
)
# Each takes exponential time, or far more memory than it has letters, in one engine or another.
REGEXES = (
    "(a+)+$",
    "(.*)*x",
    "((.*)*)*x",
    "(?:(?:(?:.{1,30}){1,30}){1,30})x",
    "(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)x",
    "(q|q_|.)*(p|pr|.)*x",
    "q_proj|(",
    "[",
    "(?P<a>.)(?P<a>.)",
    "(" * 200 + ")" * 200,
    "a{4294967296}",
    "(?<=a+)b",
    "(?:(?:(?:[a-z._0-9]{1,30}){1,30}){1,30})[A-Z]",
    "(a|a|b|.|[a-z])*[A-Z]",
    "\\",
    ".*",
    "^model.layers.0.self_attn.q_proj",
    r"layers\.0\..*q_proj",
)
TEXTS = (
    "", "x", "NaN", "Infinity", "1", "-1", "1e999", "\n", "a\nb", "\x00", "\x1b[2J", "\u202e", "\ud800", "²",
    "٣", "🤗", "a" * 5000, "9" * 5000, "true", "__class__", "../x", "%s{}", "<script>",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63),
    10**400, 0.5, -0.0, 1e308, 1e-320, math.nan, math.inf, -math.inf,
)  # fmt: skip
# "@DEEP 900@" is a list in a list in a list…; "key@TWICE" is the key itself, for the second time.
DEEP = tuple(f"@{kind} {depth}@" for kind in ("LISTS", "OBJECTS") for depth in (50, 400, 900, 980, 20000))
LONG = ("@DIGITS 4000@", "@DIGITS 5000@", "@DIGITS 60000@")

scalars: SearchStrategy[Any] = st.one_of(
    st.sampled_from((None, True, False, *NUMBERS, *TEXTS, *OUTSIDE, *REGEXES, *DEEP, *LONG)),
    st.integers(-4, 40),
    st.text(max_size=8),
    st.from_regex(r"[a-c.*+?(){}|\[\]\\^$0-9,_]{1,12}", fullmatch=True),
)
values: SearchStrategy[Any] = st.one_of(
    scalars,
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=5,
    ),
)


def rarely(draw: DrawFn, often: int) -> bool:
    """True one time in so many; what Hypothesis comes back to most, the least of all choices, is False."""
    return draw(st.integers(1, often)) == often


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    slots: list[tuple[Any, Any]] = []
    queue = [value]
    while queue:
        container = queue.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            slots.append((container, key))
            if isinstance(container[key], dict | list):
                queue.append(container[key])
    return slots


@st.composite
def edited(draw: DrawFn, document: Any, *, most: int = 3) -> Any:
    """A document with up to so many of its parts replaced, removed, renamed, swapped or written twice."""
    document = deepcopy(draw(document) if isinstance(document, SearchStrategy) else document)
    for _ in range(draw(st.sampled_from((0, 0, *range(1, most + 1))))):
        slots = places(document) if isinstance(document, dict | list) else []
        if not slots or rarely(draw, 60):
            return draw(values)
        container, key = slots[draw(st.integers(0, len(slots) - 1))]
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "swap", "twice")))
        if kind == "replace":
            container[key] = draw(values)
        elif kind == "remove":
            del container[key]
        elif kind == "swap":
            other, other_key = slots[draw(st.integers(0, len(slots) - 1))]
            container[key] = deepcopy(other[other_key])
        elif isinstance(container, dict):
            new = draw(st.sampled_from((*TEXTS, *OUTSIDE))) if kind == "rename" else f"{key}@TWICE"
            container[new] = container.pop(key) if kind == "rename" else draw(values)
        else:
            container.append(draw(values))
    return document


def encoded(document: Any) -> bytes:
    """A document as JSON, its marks carried out."""
    text = json.dumps(document)
    text = text.replace("@TWICE", "")
    text = re.sub(r'"@LISTS (\d+)@"', lambda match: "[" * int(match[1]) + "]" * int(match[1]), text)
    text = re.sub(
        r'"@OBJECTS (\d+)@"', lambda match: '{"a":' * int(match[1]) + "1" + "}" * int(match[1]), text
    )
    text = re.sub(r'"@DIGITS (\d+)@"', lambda match: "7" * int(match[1]), text)
    return text.encode()


@st.composite
def damaged(draw: DrawFn, content: SearchStrategy[bytes], *, often: int = 4) -> bytes:
    """Bytes, of which one time in so many some are lost, changed, doubled or put in."""
    data = bytearray(draw(content))
    if not rarely(draw, often):
        return bytes(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("cut", "change", "insert", "remove", "double", "flip")))
        if kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(
                st.sampled_from((b"\xff", b"\0", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"\n"))
            )
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 16))]
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        elif at < len(data):
            data[at] = (
                draw(st.integers(0, 255)) if kind == "change" else data[at] ^ 1 << draw(st.integers(0, 7))
            )
    return bytes(data)


def documents(document: Any, *, most: int = 3) -> SearchStrategy[bytes]:
    """JSON files made from a valid one."""
    return damaged(edited(document, most=most).map(encoded), often=8)
