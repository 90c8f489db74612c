"""The library: which audits are on it, by which names, and what becomes of those that cannot be read."""

import json

import pytest

from tests.dashboard.invented import draw, tables


@pytest.fixture
def save(made_up, audit_of):
    """Writes an audit of `angles` into a directory."""
    from diagnostics.store.audit_store import Store

    def save(directory, **about):
        audit = audit_of(made_up("angles", tables(), draw, {"widest": 0.25}), **about)
        with Store(directory) as store:
            for name, result in audit.results.items():
                store.write_result(name, result)
            store.write(audit)
        return directory

    return save


def test_an_audit_a_folder_of_audits_and_a_series_are_each_found(save, tmp_path):
    from dashboard.state.audit_library import AuditLibrary

    save(tmp_path / "many" / "a")
    save(tmp_path / "many" / "b")
    save(tmp_path / "single")
    for part in ("001-against-first", "002-against-previous", "run"):
        save(tmp_path / "steps" / part)
    (tmp_path / "steps" / "series.json").write_text(json.dumps({"checkpoints": []}))
    library = AuditLibrary([tmp_path / "many", tmp_path / "single" / "audit.json", tmp_path / "steps"])
    assert [entry.id for entry in library.audits] == ["a", "b", "single"]
    assert [entry.id for entry in library.series] == ["steps"]
    assert [entry.id for entry in library.parts("steps")] == [
        "steps/001-against-first",
        "steps/002-against-previous",
        "steps/run",
    ]


def test_two_audits_of_one_name_are_told_apart(save, tmp_path):
    from dashboard.state.audit_library import AuditLibrary

    library = AuditLibrary([save(tmp_path / "x" / "audit"), save(tmp_path / "y" / "audit")])
    assert [(entry.id, entry.path.parent.name) for entry in library.audits] == [
        ("audit", "x"),
        ("audit-2", "y"),
    ]


def test_a_table_cut_short_damages_its_audit_alone_until_it_is_whole_again(save, tmp_path):
    from dashboard.state.audit_library import AuditLibrary

    library = AuditLibrary([save(tmp_path / "one"), save(tmp_path / "two")])
    file = tmp_path / "one" / "tables" / "angles.vectors.parquet"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    first, second = library.audits
    assert first.audit is None
    assert "angles.vectors.parquet" in first.damage
    assert second.audit is not None
    save(tmp_path / "one", created="2026-02-12T00:00:00Z")
    assert first.damage == ""
    assert first.audit.created == "2026-02-12T00:00:00Z"


def test_an_audit_that_has_only_begun_is_damaged_and_not_an_error(tmp_path):
    from dashboard.state.audit_library import AuditLibrary

    (tmp_path / "begun" / "tables").mkdir(parents=True)
    entry = AuditLibrary([tmp_path / "begun"]).audits[0]
    assert entry.audit is None
    assert "no audit here" in entry.damage


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere", "does not exist"), ("empty", "no audit here; `tunescope audit")]
)
def test_a_place_without_audits_is_an_error_that_says_how_to_write_one(tmp_path, name, words):
    from dashboard.state.audit_library import AuditLibrary

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=words):
        AuditLibrary([tmp_path / name])


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b'{"schema": ' + b"[" * 100_000, b"[]", b'{"schema": 1}', b'{"schema": true}']
)
def test_a_corrupted_audit_does_not_stop_the_others(save, tmp_path, content):
    from dashboard.state.audit_library import AuditLibrary

    library = AuditLibrary([save(tmp_path / "one"), save(tmp_path / "two")])
    (tmp_path / "one" / "audit.json").write_bytes(content)
    first, second = library.audits
    assert first.audit is None
    assert "audit.json" in first.damage
    assert first.damage.isprintable()
    assert second.audit is not None
    assert second.damage == ""


@pytest.mark.parametrize("location", ["../../x.parquet", "{root}/x.parquet"])
def test_an_audit_that_names_a_table_outside_is_shown_as_damaged(save, tmp_path, location):
    from dashboard.state.audit_library import AuditLibrary

    library = AuditLibrary([save(tmp_path / "one"), save(tmp_path / "two")])
    file = tmp_path / "one" / "audit.json"
    file.write_text(file.read_text().replace("tables/angles.vectors.parquet", location.format(root=tmp_path)))
    (tmp_path / "one" / "tables" / "angles.vectors.parquet").rename(tmp_path / "x.parquet")
    first, second = library.audits
    assert first.audit is None
    assert "is said to be" in first.damage
    assert second.audit is not None


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"checkpoints": 3}', "{"])
def test_a_damaged_series_is_said_to_be(save, tmp_path, content):
    from dashboard.state.audit_library import AuditLibrary, read_series

    (tmp_path / "series.json").write_text(content)
    (entry,) = AuditLibrary([tmp_path]).series
    with pytest.raises(ValueError, match=r"series\.json of .*: damaged: "):
        read_series(entry)


def test_what_is_wrong_with_a_checkpoint_of_a_series_is_said_shortly(save, tmp_path):
    from dashboard.state.audit_library import AuditLibrary
    from dashboard.state.steps import read_steps

    side = {"audit": None, "metrics": {}, "verdict": "7" * 5000}
    record = {"label": "1", "ref": "r", "against_first": side, "against_previous": side}
    (tmp_path / "series.json").write_text(json.dumps({"checkpoints": [record]}))
    (entry,) = AuditLibrary([tmp_path]).series
    with pytest.raises(ValueError, match=r"series\.json of .*: damaged: unknown verdict '777") as refused:
        read_steps(entry)
    assert len(str(refused.value)) < 1200
