"""Tokenizers are equal if they split alike."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from diagnostics import (
    essential_sparsity,
    interpolation_path,
    judged_mitigation,
    layer_sharpness,
    representation_drift,
    skill_localization,
)
from diagnostics.core.analysis import NotApplicableError
from diagnostics.evaluation.tokenizers import same_rules, split_rows
from probes import CheckpointPair
from probes.text.encode import encode
from probes.text.rows import task_of
from tests.diagnostics.chains import save_llama, save_tokenizer

LETTERS = "abcdefghij "


def fast(**changes):
    """A tokenizer of characters that merges "ab", with parts of its pipeline replaced."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<s>", "[U]", *"abcdAB ", "ab"])}
    merges = changes.pop("merges", [("a", "b")])
    backend = Tokenizer(models.BPE(vocab=changes.pop("vocab", vocabulary), merges=merges, unk_token="[U]"))
    for added in changes.pop("added", ()):
        backend.add_tokens([added])
    for part, value in changes.items():
        setattr(backend, part, value)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[U]", eos_token="<s>")


CHANGES = {
    "normalizer": {"normalizer": normalizers.Lowercase()},
    "pre_tokenizer": {"pre_tokenizer": pre_tokenizers.Split("b", "isolated")},
    "merges": {"merges": []},
    "post_processor": {
        "post_processor": processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    },
    "added": {"added": [AddedToken("cd")]},
}


@pytest.mark.parametrize("part", CHANGES)
def test_every_part_of_the_pipeline_counts_and_rows_tell_whether_it_matters(part):
    base, tuned = fast(), fast(**CHANGES[part])
    assert not same_rules(base, tuned)

    def compared(*texts):
        task = task_of(texts, ref="rows")
        return split_rows(
            [(task, *(encode(task, tokenizer, max_length=None) for tokenizer in (base, tuned)))], base, tuned
        )

    split = compared("d", "A", "ab", "cd")
    assert split is not None
    assert (split.count, split.total) == (4 if part == "post_processor" else 1, 4)
    assert (compared("d d", "a") is None) == (part != "post_processor")


def test_what_is_written_alike_is_the_same_whatever_was_cut_or_padded_with_it():
    base, tuned = fast(), fast()
    tuned.backend_tokenizer.enable_truncation(3)
    assert json.loads(tuned.backend_tokenizer.to_str())["truncation"]
    assert same_rules(base, tuned)


@given(st.lists(st.text("abcd AB", max_size=6), min_size=1, max_size=4), st.sampled_from(sorted(CHANGES)))
def test_rows_differ_just_where_the_ids_that_the_tokenizers_give_them_do(texts, part):
    base, tuned = fast(), fast(**CHANGES[part])
    task = task_of(texts)
    readings = [encode(task, tokenizer, max_length=None) for tokenizer in (base, tuned)]
    split = split_rows([(task, *readings)], base, tuned)
    expected = sum(base(text)["input_ids"] != tuned(text)["input_ids"] for text in texts)
    assert (split.count if split else 0) == expected


ONE_MODEL = {
    "drift": representation_drift, "mitigation": judged_mitigation, "path": interpolation_path,
    "sharpness": layer_sharpness, "skills": skill_localization, "sparsity": essential_sparsity,
}  # fmt: skip
TASK = [f"{first}{second}" for first in "abcdij" for second in "bcdefgh"]


@pytest.fixture(scope="module")
def split_pair(tmp_path_factory):
    """Two models with one vocabulary; only base's tokenizer merges "ab"."""
    places = []
    for name, merged in (("base", True), ("tuned", False)):
        directory = tmp_path_factory.mktemp("models") / name
        places.append(save_llama(directory, seed=1, characters=LETTERS, shift=0.1 * (not merged), rows=13))
        save_tokenizer(directory, LETTERS, words=["ab"], merged=merged)
    return CheckpointPair(*places)


@pytest.mark.parametrize("name", ONE_MODEL)
def test_what_runs_one_model_on_rows_that_are_split_differently_does_not_apply(name, split_pair):
    rows = {"task": TASK} | ({"keep": TASK[10:]} if name == "mitigation" else {})
    with pytest.raises(
        NotApplicableError, match=r"split 1 of \d+ rows differently, the first at task:1 \('ab'"
    ):
        ONE_MODEL[name](split_pair, **rows)


def test_it_applies_to_rows_that_both_split_alike(split_pair):
    result = interpolation_path(split_pair, TASK[1:], alphas=(0.5,))
    assert result.metrics["rows_task"] == len(TASK) - 1
    assert representation_drift(split_pair, TASK[1:]).metrics["rows_task"] == len(TASK) - 1
