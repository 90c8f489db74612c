"""The miniature of likelihood-ratio OOD: its texts, its claims, and, slowly, that they hold."""

from pathlib import Path

import ood_miniature as miniature
import pandas as pd
import pytest

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def data() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"the texts of SNIPS and CLINC150 are not in {DATA}")
    return DATA


def table(near: tuple[float, float], queries: tuple[float, float]) -> pd.DataFrame:
    return pd.DataFrame({"near": near, "queries": queries}, index=["ratio", "tuned_likelihood"])


def test_the_claims_hold_of_tables_that_keep_them_and_fail_one_by_one():
    def failing(first: pd.DataFrame, second: pd.DataFrame) -> list[str]:
        return [claim.text for claim in miniature.claims({100: first, 200: second}) if not claim.holds]

    good = table((0.97, 0.7), (0.99, 0.4))
    assert not failing(good, good)
    # What was read by base is claimed of the first table alone.
    assert not failing(good, table((0.97, 0.7), (0.9, 0.6)))
    assert failing(good, table((0.89, 0.5), (0.99, 0.4))) == ["near: the ratio's AUROC is 0.90 or more"]
    assert failing(table((0.97, 0.9), (0.99, 0.4)), good) == [
        "near: it is 0.10 or more above the tuned likelihood's"
    ]
    assert failing(table((0.97, 0.7), (0.94, 0.4)), good) == ["queries: the ratio is above 0.95"]
    assert failing(table((0.97, 0.7), (0.99, 0.5)), good) == [
        "queries: the tuned likelihood is worse than chance"
    ]


def test_neither_base_nor_tuned_sees_what_is_measured(data: Path):
    texts = miniature.Texts.read(data, rows=10_000)
    # Of 700 rows each, 200 of valid and 196 of test are of the two intents, and 3,777 of 13,084 of train.
    assert (len(texts.inside), len(texts.outside["near"])) == (1004, 396)
    assert not {*texts.outside["documentation"]} & {*texts.base}
    assert len(texts.task) == 9307
    shared = sum(text in {*texts.task} for text in texts.outside["near"])
    assert not shared


@pytest.mark.slow
def test_a_quick_run_gives_every_number(data: Path, tmp_path: Path):
    tables = miniature.measure(data, miniature.QUICK, tmp_path)
    assert list(tables) == list(miniature.QUICK.tuning)
    for table in tables.values():
        assert set(table.columns) == {*miniature.SETS, "all"}
        assert table.loc[list(miniature.SCORES)].notna().all(axis=None)


@pytest.mark.slow
def test_what_must_hold_holds(data: Path, tmp_path: Path, capsys):
    tables = miniature.measure(data, miniature.Budget(), tmp_path)
    miniature.show(tables, miniature.Console(width=150))
    printed = capsys.readouterr().out
    for words in ("near (the intents held out)", "length", "0.980"):
        assert words in printed
    for claim in miniature.claims(tables):
        assert claim.holds, f"{claim.text}: {claim.numbers}"
