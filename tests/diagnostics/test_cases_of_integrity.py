"""The filed cases of pairs that are not what they seem: no update, rounding alone, unusable weights.

The makers lie in `shared/cases` beside the repository, with what is right.
"""

import pytest

from diagnostics import checkpoint_integrity
from probes import CheckpointPair
from probes.errors import InputError
from tests.cases import make_case


@pytest.fixture(scope="module")
def case_of(tmp_path_factory):
    """Makes a case: `case_of("no_update")` gives its directory."""
    folder = tmp_path_factory.mktemp("cases")

    def make(name):
        out = folder / name
        return out if out.exists() else make_case(name, out)

    return make


def findings(pair):
    result = checkpoint_integrity(pair)
    return {finding.metric: finding.severity for finding in result.findings()}


@pytest.mark.parametrize("tuned", ["same", "zeros"])
def test_a_model_without_an_update_was_not_tuned(case_of, tuned):
    case = case_of("no_update")
    assert findings(CheckpointPair(case / "base", case / tuned)) == {"nothing_tuned": "fail"}


def test_rounding_alone_is_no_update(case_of):
    case = case_of("rounded")
    assert findings(CheckpointPair(case / "base", case / "cast")) == {"nothing_tuned": "fail"}


def test_entries_that_moved_are_counted_without_those_that_were_rounded(case_of):
    case = case_of("rounded")
    result = checkpoint_integrity(CheckpointPair(case / "base", case / "tuned"))
    table = result.tables["compared"]
    assert 2300 < table["changed"].sum() < 2460  # a step below a half unit of bfloat16 cannot be seen
    assert table[~table["tensor"].str.contains("mlp")]["changed"].sum() == 0
    assert result.findings() == []


def test_a_head_of_nan_fails(case_of):
    case = case_of("unusable")
    assert findings(CheckpointPair(case / "base", case / "nan-head")) == {"nonfinite_tuned": "fail"}


@pytest.mark.parametrize("tuned", ["all-empty", "embed-empty", "mlp-empty", "adapter-empty"])
def test_weights_of_size_0_are_refused_before_anything_is_measured(case_of, tuned):
    case = case_of("unusable")
    with pytest.raises(InputError, match="of size 0"):
        CheckpointPair(case / "base", case / tuned)


def test_a_changed_function_is_a_warning(case_of):
    case = case_of("config_rope")
    assert findings(CheckpointPair(case / "base", case / "tuned")) == {"function_changes": "warn"}
