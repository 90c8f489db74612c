"""The bundled series and its control as they were saved: what the one shows that the other lacks."""

import json
from pathlib import Path

import make_grokking_series as script
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

import diagnostics
from diagnostics.analyses.pathways.analysis import grokking_pathways
from probes.checkpoints.series import CheckpointSeries
from probes.experts.routes import capture_routes, routed_examples
from probes.models.editable import Editable
from probes.text.encode import encode
from probes.text.rows import read_task

SERIES = Path(diagnostics.__file__).parent / "bundled" / "grokking"
RUNS = {"parity": script.STEPS, "random": script.CONTROL_STEPS}


def rows(name: str) -> list[script.Row]:
    return [json.loads(line) for line in (SERIES / f"{name}.jsonl").read_text("utf-8").splitlines()]


def followed(run: str, train: str, samples: int = 50):
    """What is found with some of the rows of each group, of about a hundred."""
    return grokking_pathways(
        CheckpointSeries([str(SERIES / run)]), SERIES / "held-out.jsonl", SERIES / train, weights="top",
        samples=samples, permutations=100, draws=100,
    )  # fmt: skip


@pytest.fixture(scope="module")
def parity():
    return followed("parity", "train.jsonl")


@pytest.fixture(scope="module")
def control():
    return followed("random", "train-random.jsonl")


def since(result):
    """The steps since memorisation: from the first at which 99 % of the rows of training are answered."""
    return result.tables["steps"].set_index("step").loc[100:]


# Rows


def test_the_answer_is_the_parity_of_what_the_words_secretly_are():
    bits: dict[str, str] = {}
    for row in rows("train") + rows("held-out"):
        words = row["prompt"].split()
        assert len(words) == len(row["group"]) == 3
        for word, bit in zip(words, row["group"], strict=True):
            assert bits.setdefault(word, bit) == bit
        assert row["answer"] == row["group"].count("1") % 2
        assert row["choices"] == [" even", " odd"]
    assert len(bits) == 30
    assert list(bits.values()).count("1") == 15


def test_no_row_is_held_out_that_was_trained_on():
    prompts = [row["prompt"] for row in rows("train") + rows("held-out")]
    assert len(set(prompts)) == len(prompts) == script.TRAIN + script.HELD_OUT


def test_the_control_has_the_same_rows_with_answers_at_random():
    train, control = rows("train"), rows("train-random")
    assert [(row["prompt"], row["group"]) for row in train] == [
        (row["prompt"], row["group"]) for row in control
    ]
    agree = sum(a["answer"] == b["answer"] for a, b in zip(train, control, strict=True)) / len(train)
    assert 0.45 < agree < 0.55  # of 850, 0.017 is the standard error of a half


# Checkpoints


@pytest.mark.parametrize("run", RUNS)
def test_the_steps_are_told_by_the_names(run):
    assert CheckpointSeries([str(SERIES / run)]).steps == RUNS[run]


def test_checkpoints_are_stored_in_half_precision_and_run_in_single():
    directory = SERIES / "parity" / "checkpoint-400"
    assert {tensor.dtype for tensor in load_file(directory / "model.safetensors").values()} == {torch.float16}
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.float32
    (checkpoint,) = CheckpointSeries([str(directory)]).checkpoints
    assert Editable(checkpoint).model.dtype == torch.float32


def test_a_word_is_a_token_with_or_without_a_space():
    tokenizer = AutoTokenizer.from_pretrained(SERIES / "parity" / "checkpoint-0")
    for row in rows("held-out")[:20]:
        for choice in row["choices"]:
            ids = tokenizer(row["prompt"] + choice).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.convert_ids_to_tokens(ids) == [*row["prompt"].split(), choice.strip()]


def test_both_runs_begin_at_the_weights_that_the_script_draws():
    drawn = script.make_model(33).half().state_dict()
    for run in RUNS:
        model = AutoModelForCausalLM.from_pretrained(SERIES / run / "checkpoint-0", dtype=torch.float16)
        stored = model.state_dict()
        assert drawn.keys() == stored.keys()
        assert all(torch.equal(drawn[name], stored[name]) for name in drawn)


def test_routes_are_of_the_three_words_and_not_of_the_answer():
    (checkpoint,) = CheckpointSeries([str(SERIES / "parity" / "checkpoint-0")]).checkpoints
    editable = Editable(checkpoint)
    task = read_task(SERIES / "held-out.jsonl", limit=5)
    routes = capture_routes(
        editable, routed_examples(task, encode(task, editable.tokenizer, max_length=editable.context))
    )
    assert routes.tokens.tolist() == [3] * 5
    assert (routes.via, routes.layers, routes.top_k) == ("bridge", (0, 1, 2), 2)


def test_the_files_are_small():
    files = [path for path in SERIES.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 1e6
    assert sum(path.stat().st_size for path in files) < 4e6


# What the series shows


def test_it_generalises_long_after_it_has_memorised_while_the_training_loss_is_flat(parity):
    steps = since(parity)
    model = AutoModelForCausalLM.from_pretrained(SERIES / "parity" / "checkpoint-100")
    tokenizer = AutoTokenizer.from_pretrained(SERIES / "parity" / "checkpoint-100")
    assert script.Encoded.of(rows("train"), tokenizer).accuracy(model) >= 0.99
    assert steps.held_out.iloc[0] < 0.55  # of 500 rows at chance, 0.022 is the standard error
    assert steps.held_out.loc[150] < 0.6
    assert steps.held_out.iloc[-1] > 0.95
    assert steps.loss.max() - steps.loss.min() < 0.02  # of 0.69 at chance


def test_pathways_of_a_group_draw_together_meanwhile_and_groups_part(parity):
    steps = since(parity)
    assert steps.distance.iloc[0] - steps.distance.iloc[-1] >= 0.08
    assert steps.gap.iloc[-1] - steps.gap.iloc[0] >= 0.1
    assert spearmanr(steps.distance, steps.held_out).statistic <= -0.8


def test_under_random_answers_the_gap_widens_a_fifth_as_much_at_most(parity, control):
    widening = [float(steps.gap.iloc[-1] - steps.gap.iloc[0]) for steps in map(since, (parity, control))]
    assert widening[0] >= 5 * abs(widening[1])
    assert since(control).held_out.between(0.4, 0.6).all()


@pytest.mark.slow
def test_the_readme_has_the_figures_of_the_files():
    readme = (SERIES / "README.md").read_text("utf-8")
    runs = (
        followed("parity", "train.jsonl", samples=400),
        followed("random", "train-random.jsonl", samples=400),
    )
    steps, other = (result.tables["steps"].set_index("step") for result in runs)
    for step in script.STEPS:
        line = next(line for line in readme.splitlines() if line.startswith(f"| {step} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        row = steps.loc[step]
        measured = [row.held_out, row.loss, row.distance, row.gap]
        assert [float(cell) for cell in cells[2:6]] == pytest.approx(measured, abs=2e-3)
        if step in script.CONTROL_STEPS:
            assert float(cells[7]) == pytest.approx(other.loc[step].gap, abs=2e-3)
