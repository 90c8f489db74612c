"""Every table that an analysis returns, and every column, stands in the `Tables:` section of its docstring.

The section has an entry for each table: "`name`: one row a …: column, column (unit), …". A column that comes
once for each of several metrics, sides or sets may be written with a placeholder, as `<metric>_low`.
"""

import inspect
import re

import pytest

from diagnostics import LikelihoodRatioDetector
from diagnostics.core.registry import find
from tests.reference import BUNDLED, results

DOCUMENTED = (
    "drift",
    "dynamics",
    "integrity",
    "intruders",
    "mitigation",
    "ood",
    "path",
    "pathways",
    "trajectory",
    pytest.param("sharpness", marks=pytest.mark.slow),
)


def entries(documented):
    """The text of each table's entry in the `Tables:` section."""
    section = re.search(r"^Tables:\n((?: {4}.*\n?)+)", inspect.getdoc(documented) or "", re.MULTILINE)
    assert section, f"{documented.__name__} has no section `Tables:`"
    _, *parts = re.split(r"^ {4}`(\w+)`: ", section[1], flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def columns_of(entry):
    """A pattern of all column names that an entry holds; a placeholder alone would name any column."""
    words = [word for word in re.findall(r"[\w<>]+", entry) if re.sub(r"<\w+>", "", word)]
    return re.compile("|".join(re.sub(r"<\w+>", r"\\w+", word) for word in words))


def missing(documented, tables):
    """Tables and columns that the docstring lacks."""
    texts = entries(documented)
    lacking = [name for name in tables if name not in texts]
    return lacking + [
        f"{name}.{column}"
        for name, table in tables.items()
        if name in texts
        for column in table.columns
        if not columns_of(texts[name]).fullmatch(column)
    ]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_docstring_names_every_table_and_column(name):
    _, _, result = next(results((name,)))
    assert result.tables
    assert missing(find(name).function, result.tables) == []


def test_the_detector_names_every_column_of_its_tables():
    detector = LikelihoodRatioDetector.fit((BUNDLED / "base", BUNDLED / "lora-r1"), ["one", "two", "three"])
    tables = {"rows": detector.rows(["four"]), "explain": detector.explain("five")}
    detector.close()
    assert missing(LikelihoodRatioDetector, tables) == []


def test_a_missing_table_and_a_missing_column_are_noticed():
    import pandas as pd

    def analysis():
        """Measure.

        Tables:
            `layers`: one row a layer: layer, rsa,
                <metric>_low (bounds).

        Raises:
            InputError: cka.
        """

    frame = pd.DataFrame(columns=["layer", "rsa", "auroc_low", "cka"])
    assert missing(analysis, {"layers": frame, "sets": frame}) == ["sets", "layers.cka"]
