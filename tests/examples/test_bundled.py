"""The bundled checkpoints, as they were saved: others open them, and they show what they are for."""

from collections.abc import Iterator
from pathlib import Path

import make_bundled
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import diagnostics
from probes import CheckpointPair

BUNDLED = Path(diagnostics.__file__).parent / "bundled"
TUNED = ["full", "lora-r1", "lora-r8"]
MODELS = ["base", *TUNED]


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    """Every model by name, adapters merged by peft."""
    return {name: make_bundled.opened(BUNDLED, name) for name in MODELS}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED / "base")


@pytest.fixture(scope="module")
def task(tokenizer) -> make_bundled.Encoded:
    return make_bundled.Encoded(make_bundled.read_rows(BUNDLED / "task.jsonl"), tokenizer)


def intruders(base: torch.nn.Module, tuned: torch.nn.Module) -> dict[str, int]:
    """Of every matrix, by the definition: two whole decompositions in float64."""

    def counts() -> Iterator[tuple[str, int]]:
        for name, weight in base.named_parameters():
            if "_proj" in name:
                U0, U1 = (
                    torch.linalg.svd(W.detach().double(), full_matrices=False).U
                    for W in (weight, tuned.get_parameter(name))
                )
                yield name, int(((U0.mT @ U1[:, :10]).abs().amax(dim=0) < 0.5).sum())

    return dict(counts())


@pytest.fixture(scope="module")
def counts(models) -> dict[str, dict[str, int]]:
    return {name: intruders(models["base"], models[name]) for name in TUNED}


def test_every_way_of_tuning_reached_a_like_loss_and_solves_what_the_base_cannot(models, task):
    loss = {name: task.choice_loss(model) for name, model in models.items()}
    accuracy = {name: task.accuracy(model) for name, model in models.items()}
    # Each stopped at the same loss on 720 validation rows; on these other 240 a standard error is about 0.03.
    assert max(loss[name] for name in TUNED) - min(loss[name] for name in TUNED) < 0.06
    assert max(loss[name] for name in TUNED) < loss["base"] - 0.2
    assert accuracy["base"] < 0.6  # chance is 0.5 and, of 240 rows, 0.03 its standard error
    assert min(accuracy[name] for name in TUNED) > 0.7


@pytest.mark.parametrize("name", ["lora-r1", "lora-r8"])
def test_an_adapter_has_three_times_the_intruders_of_the_full_fine_tune(counts, name: str):
    assert sum(counts[name].values()) >= 3 * max(1, sum(counts["full"].values()))


@pytest.mark.parametrize("name", TUNED)
def test_tunescope_counts_in_every_matrix_what_the_definition_does(counts, name: str):
    pair = diagnostics_pair(name)
    table = diagnostics.intruder_dimensions(pair, k=10, epsilon=0.5).tables["matrices"]
    assert dict(zip(table["matrix"], table["intruders"], strict=True)) == counts[name]


def diagnostics_pair(name: str):
    from probes import CheckpointPair

    return CheckpointPair(BUNDLED / "base", BUNDLED / name)


def test_the_base_against_itself_has_none():
    result = diagnostics.intruder_dimensions(diagnostics_pair("base"))
    assert (result.metrics["intruders"], result.metrics["changed"]) == (0, 0)


@pytest.mark.parametrize("name", TUNED)
def test_only_the_matrices_of_the_blocks_were_tuned(models, name: str):
    for weight, value in models["base"].named_parameters():
        assert torch.equal(value, models[name].get_parameter(weight)) == ("_proj" not in weight), weight


def test_every_text_survives_the_tokenizer(tokenizer):
    for name in ("keep", "ood-words", "ood-code"):
        for row in make_bundled.read_rows(BUNDLED / f"{name}.jsonl"):
            ids = tokenizer(row["text"]).input_ids
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.decode(ids[1:]) == row["text"]


def test_whole_models_load_by_auto_classes_in_the_dtype_that_they_were_saved_in():
    for name in ("base", "full"):
        model = AutoModelForCausalLM.from_pretrained(BUNDLED / name)
        assert model.dtype == torch.bfloat16
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_files_are_small_and_name_no_place_of_a_machine():
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    places = (b"/root/", b"/home/", b"/work/", b"/tmp/", b"C:\\")
    for path in files:
        if path.suffix != ".safetensors" and path.name != "tokenizer.json":
            assert not any(prefix in path.read_bytes() for prefix in places), path


def test_the_readme_has_the_figures_of_the_files(models, task, counts):
    readme = (BUNDLED / "README.md").read_text(encoding="utf-8")
    for name in TUNED:
        line = next(line for line in readme.splitlines() if line.startswith(f"| `{name}`"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert float(cells[3]) == pytest.approx(task.accuracy(models[name]), abs=0.01)
        assert float(cells[4]) == pytest.approx(task.choice_loss(models[name]), abs=0.01)
        assert int(cells[-1]) == sum(counts[name].values())


@pytest.mark.parametrize("tuned", TUNED)
def test_the_ratio_tells_random_words_from_the_task_better_than_the_likelihood(tuned):
    from diagnostics import likelihood_ratio_ood

    pair = CheckpointPair(BUNDLED / "base", BUNDLED / tuned)
    result = likelihood_ratio_ood(
        pair, BUNDLED / "task.jsonl", {"words": BUNDLED / "ood-words.jsonl"}, draws=2
    )
    auroc = result.tables["detection"].query("ood == 'words'").set_index("score")["auroc"]
    assert auroc["ratio"] >= 0.9
    assert auroc["ratio"] >= auroc["tuned_likelihood"] + 0.1
