"""What changed outside the weights: each kind of difference, judged, and files that cannot be read."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics import checkpoint_integrity
from diagnostics.analyses.integrity.file_changes import changes, template_diff
from diagnostics.analyses.integrity.model_files import ModelFiles
from probes import CheckpointPair
from tests.diagnostics.planted_faults import intact


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return intact(tmp_path_factory.mktemp("original"), "llama", "bfloat16")


@pytest.fixture
def edited(original, tmp_path):
    """`edited(file, edit)`: the changes of a pair in which a file of tuned was edited (JSON as a dict)."""

    def result(*edits, side="tuned"):
        shutil.copytree(original, tmp_path / "pair")
        for file, edit in edits:
            path = tmp_path / "pair" / side / file
            if edit is None:
                path.unlink()
            elif file.endswith(".json"):
                content = json.loads(path.read_text())
                edit(content)
                path.write_text(json.dumps(content))
            else:
                path.write_text(edit(path.read_text()))
        return checkpoint_integrity(CheckpointPair(tmp_path / "pair" / "base", tmp_path / "pair" / "tuned"))

    return result


def rows(result):
    return {(row.where, row.what): row.judged for row in result.tables["changes"].itertuples()}


def raised(result):
    return {finding.metric for finding in result.findings()}


def test_files_that_are_equal_have_no_changes(edited):
    result = edited()
    assert rows(result) == {}
    assert raised(result) == set()


def test_a_field_that_changes_the_function_is_a_warning_and_shows_both_values(edited):
    result = edited(("config.json", lambda config: config.update(rms_norm_eps=0.1)))
    row = result.tables["changes"].iloc[0]
    assert (row["what"], row["base"], row["tuned"], row["judged"]) == ("rms_norm_eps", "1e-06", "0.1", "warn")
    assert raised(result) == {"function_changes"}


def test_a_field_that_describes_is_information(edited):
    result = edited(("config.json", lambda config: config.update(use_cache=False)))
    assert rows(result) == {("config", "use_cache"): "info"}
    assert raised(result) == set()


def test_a_shorter_context_is_a_warning(edited):
    result = edited(("config.json", lambda config: config.update(max_position_embeddings=64)))
    assert rows(result) == {("config", "max_position_embeddings"): "warn"}
    assert raised(result) == {"shortened"}


def test_a_token_of_another_id_is_a_warning(edited):
    def swap(tokenizer):
        words = tokenizer["model"]["vocab"]
        words["w1"], words["w2"] = words["w2"], words["w1"]

    result = edited(("tokenizer.json", swap))
    row = result.tables["changes"].iloc[0]
    assert (row["what"], row["judged"]) == ("token ids", "warn")
    assert row["base"] == "'w1' 7, 'w2' 8"
    assert row["tuned"] == "'w1' 8, 'w2' 7"
    assert raised(result) == {"tokenizer_changes"}


def test_added_tokens_are_information_and_removed_ones_a_warning(edited):
    def exchange(tokenizer):
        words = tokenizer["model"]["vocab"]
        words["new"] = words.pop("w57")

    assert rows(edited(("tokenizer.json", exchange))) == {
        ("tokenizer", "tokens removed"): "warn",
        ("tokenizer", "tokens added"): "info",
    }


def test_another_splitting_of_the_same_vocabulary_is_a_warning(edited):
    result = edited(
        ("tokenizer.json", lambda tokenizer: tokenizer.update(pre_tokenizer={"type": "Whitespace"}))
    )
    assert rows(result) == {("tokenizer", "pre_tokenizer"): "warn"}
    assert raised(result) == {"tokenizer_changes"}


def test_an_edited_chat_template_is_shown_as_a_difference(edited):
    result = edited(("chat_template.jinja", lambda text: text.replace("<|end|>", "<|end|> </s>")))
    assert rows(result) == {("template", "chat template"): "warn"}
    marks = result.tables["template"]["mark"].tolist()
    assert "+" in marks
    assert "-" in marks
    assert any("</s>" in text for text in result.tables["template"]["text"])


def test_a_template_that_base_lacks_is_information(edited):
    result = edited(("chat_template.jinja", None), side="base")
    assert rows(result)["template", "chat template"] == "info"
    assert "template_changed" not in raised(result)


def test_generation_that_no_longer_stops_at_the_end_of_a_turn_is_a_warning(edited):
    result = edited(("generation_config.json", lambda config: config.update(eos_token_id=2)))
    [row] = [row for row in result.tables["changes"].itertuples() if row.what == "eos_token_id"]
    assert (row.base, row.tuned, row.judged) == ("3 '<|end|>'", "2 '</s>'", "warn")
    assert "'<|end|>'" in row.meaning
    assert raised(result) == {"lost_stops"}


def test_one_more_id_to_stop_at_is_information(edited):
    result = edited(("generation_config.json", lambda config: config.update(eos_token_id=[3, 2])))
    assert rows(result) == {("generation", "eos_token_id"): "info"}


def test_a_stop_that_base_misses_too_is_information(edited, original, tmp_path):
    for side in ("base", "tuned"):
        path = original / side / "generation_config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"eos_token_id": 2}))
    try:
        result = edited()
    finally:
        for side in ("base", "tuned"):
            path = original / side / "generation_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 3}))
    assert rows(result) == {("generation", "eos_token_id"): "info"}
    assert raised(result) == set()


def test_an_id_beyond_the_vocabulary_is_never_generated(edited):
    result = edited(("generation_config.json", lambda config: config.update(eos_token_id=[3, 64])))
    assert raised(result) == {"lost_stops"}
    assert "id 64 is beyond tuned's 64 tokens" in result.tables["changes"]["meaning"].iloc[0]


def test_other_settings_of_generation_are_information(edited):
    result = edited(("generation_config.json", lambda config: config.update(temperature=0.3)))
    assert rows(result) == {("generation", "temperature"): "info"}


@pytest.mark.parametrize(("base", "tuned", "judged"), [("ab", "ba", "warn"), ("ab", "cd", "info")])
def test_classes_in_another_order_are_a_warning_and_new_ones_information(
    edited, original, base, tuned, judged
):
    from diagnostics.analyses.integrity.file_changes import _labels

    sides = [ModelFiles(config={"id2label": dict(enumerate(names))}) for names in (base, tuned)]
    [change] = _labels(*sides)
    assert (change.judged, change.kind) == (judged, "reordered_labels" if judged == "warn" else "")
    assert (change.base, change.tuned) == (json.dumps(list(base)), json.dumps(list(tuned)))


def test_a_damaged_file_is_named_and_no_crash(edited, original):
    result = edited(("tokenizer_config.json", None))
    assert "tokenizer_changes" not in raised(result)  # a missing file is no failure
    assert result.metrics["damaged"] == 0


def test_a_file_that_is_no_json_is_named(original, tmp_path):
    shutil.copytree(original, tmp_path / "pair")
    (tmp_path / "pair" / "tuned" / "tokenizer.json").write_text("{")
    result = checkpoint_integrity(CheckpointPair(tmp_path / "pair" / "base", tmp_path / "pair" / "tuned"))
    assert rows(result)["files", "tokenizer.json"] == "warn"
    assert "damaged" in raised(result)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
WEIGHTS = {"model.layers.0.mlp.up_proj.weight": torch.eye(4)}
FIELDS = (
    ("tokenizer.json", ("model", "added_tokens", "normalizer", "pre_tokenizer")),
    ("tokenizer_config.json", ("eos_token", "chat_template", "model_max_length", "pad_token")),
    ("generation_config.json", ("eos_token_id", "pad_token_id", "temperature")),
)


@given(value=JSON, place=st.sampled_from([(file, key) for file, keys in FIELDS for key in keys]))
def test_whatever_a_field_holds_nothing_crashes(value, place):
    file, key = place
    with TemporaryDirectory() as name:
        sides = []
        for role in ("base", "tuned"):
            folder = Path(name) / role
            folder.mkdir()
            content = {key: value if role == "tuned" else None, "model": {"vocab": {"a": 0}}}
            (folder / file).write_text(json.dumps({**content, key: content[key]}))
            sides.append(ModelFiles(config={"vocab_size": 4}, directories=(folder,)))
        for base, tuned in (sides, sides[::-1]):
            for change in changes(CheckpointPair(WEIGHTS, WEIGHTS), base, tuned):
                assert change.meaning
                assert all(text.isprintable() for text in (change.base, change.tuned, change.meaning))
            template_diff(base, tuned)


def test_hostile_texts_stay_on_one_line(edited):
    name = "w\n\x1b[31m" * 100
    result = edited(("tokenizer.json", lambda tokenizer: tokenizer["model"]["vocab"].update({name: 63})))
    for column in ("base", "tuned", "meaning"):
        assert all(text.isprintable() and len(text) <= 160 for text in result.tables["changes"][column])


def test_without_files_what_was_not_compared_is_said():
    base = {"model.layers.0.mlp.up_proj.weight": torch.eye(4)}
    result = checkpoint_integrity(CheckpointPair(base, {name: 2 * value for name, value in base.items()}))
    assert any("no tokenizer" in note for note in result.notes)
