"""The filed case of unusable checkpoints: empty tensors, NaN, shards, and one still being written."""

import pytest

from diagnostics.audit.run import audit
from diagnostics.audit.series import series
from probes.errors import InputError
from tests.cases import make_case


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case("unusable", tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize(
    ("tuned", "reason"),
    [
        ("all-empty", "cannot be used: 21 tensors are of size 0, such as lm_head.weight; ZeRO-3 leaves"),
        ("embed-empty", "cannot be used: 2 tensors are of size 0, such as lm_head.weight; ZeRO-3 leaves"),
        ("mlp-empty", "cannot be used: 6 tensors are of size 0, such as model.layers.0.mlp.down_proj.weight"),
        ("adapter-empty", "cannot be used: 8 tensors are of size 0, such as .*lora_A.weight; ZeRO-3 leaves"),
        ("adapter-partly", "cannot be used: 4 tensors are of size 0, such as .*layers.1.*lora_A.weight"),
        (
            "checkpoint-200",
            r"DeepSpeed's ZeRO \(global_step200, .*\); gather them with `python .*zero_to_fp32",
        ),
        ("fsdp-checkpoint-200", "holds the shards of FSDP .*; merge them with `accelerate merge-weights"),
        ("run", "holds models in directories of their own .*; name one"),
    ],
)
def test_what_cannot_be_used_is_refused_and_leaves_no_directory(case, tmp_path, tuned, reason):
    with pytest.raises(InputError, match=reason):
        audit(case / "base", case / tuned, out=tmp_path / "audit", only="intruders")
    assert not (tmp_path / "audit").exists()


@pytest.mark.parametrize("pair", [("base", "nan-head"), ("nan-head", "base")])
def test_a_head_of_nan_fails_an_audit_that_does_not_read_it(case, tmp_path, pair):
    finished = audit(*(case / side for side in pair), out=tmp_path / "audit", only="intruders")
    assert (finished.verdict, finished.exit_code) == ("fail", 2)
    assert "2 tensors are NaN or infinite, such as lm_head.weight" in finished.analyses["integrity"].reason


def test_a_checkpoint_without_weights_is_left_out_of_its_run(case, tmp_path):
    finished = series([case / "base", case / "run"], out=tmp_path / "series", only="intruders")
    assert [row.label for row in finished.rows] == ["100", "200"]
    assert list(finished.left_out) == [str(case / "run/checkpoint-1000")]
    assert finished.exit_code == 0
