"""What the miniature of skills teaches: texts, answers, and what is tuned and planted."""

import copy

import majority
import pytest
import torch
from symbols import make_tokenizer, write_rows

from diagnostics.analyses.skills.region import intersection, size
from probes.text.encode import encode
from probes.text.rows import read_task


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def world(generator) -> majority.World:
    return majority.World.drawn(generator)


@pytest.fixture(scope="module")
def model():
    return majority.make_model(0)


def test_halves_differ_as_they_are_said_to(world):
    first, second, third = world.halves
    assert world.halves.sum(dim=1).tolist() == [16, 16, 16]
    assert int((first != third).sum()) == 4
    # Half of either is in the second: of 16 symbols 8.
    assert int((first & second).sum()) == int((third & second).sum()) == 8


def test_the_truth_is_whether_seven_or_more_of_twelve_symbols_are_in_a_half(world):
    inside, outside = (world.halves[0] == half for half in (True, False))
    inside, outside = inside.nonzero()[:, 0], outside.nonzero()[:, 0]
    for count in (6, 7):
        text = torch.cat([inside[:count], outside[: 12 - count]])
        assert world.truth(text[None])[0, 0] == (count > 6)


def test_so_many_answers_are_wrong_as_is_said(world, generator):
    for noise in (0.0, 0.15):
        items = world.items(1, 4000, generator, noise=noise)
        wrong = (items.answers != world.truth(items.ids[:, :-1])[:, 1]).double().mean()
        # The standard error of 0.15 is 0.006.
        assert float(wrong) == pytest.approx(noise, abs=0.02 if noise else 0)


def test_rows_say_in_words_what_items_say_in_numbers(world, generator, tmp_path):
    items = world.items(2, 3, generator)
    tokenizer = make_tokenizer(majority.WORDS)
    path = write_rows(items.rows(), tmp_path / "rows.jsonl")
    examples = encode(read_task(path), tokenizer, max_length=None)
    for number, ids in enumerate(items.ids.tolist()):
        assert ids[-1] == majority.WORDS.index("R2")
        # One example for each choice, the prompt and then the answer.
        both = [example.ids for example in examples[2 * number : 2 * number + 2]]
        assert both == [[*ids, majority.NO], [*ids, majority.YES]]


def test_the_blocks_have_as_many_entries_as_is_said(model):
    # Two blocks: 12 · 64² weights, 4 · 64 + 4 · 64 + 64 biases, and two norms of 2 · 64.
    assert majority.entries_of(model) == 2 * (12 * 64**2 + 9 * 64 + 4 * 64) == 99_968


def test_places_are_told_by_tensor(model):
    weights = majority.blocks(model)
    first, second = list(weights)[:2]
    start = weights[first].numel()
    entries = majority.located(model, torch.tensor([start + 1, 0, start - 1]))
    assert {name: index.tolist() for name, index in entries.items()} == {first: [0, start - 1], second: [1]}


@pytest.mark.parametrize("how", ["sgd", "adamw"])
def test_tuning_leaves_embeddings_and_head_as_they_are(model, world, generator, how):
    tuned = copy.deepcopy(model)
    majority.tune(tuned, [world.items(0, 32, generator)], how, 2, seed=0)
    for name, weight in tuned.named_parameters():
        same = torch.equal(weight, model.get_parameter(name))
        assert same == (".h." not in name), name


def test_what_is_planted_can_learn(model, world, generator):
    items = [world.items(0, 32, generator)]
    places = majority.steep(model, items, share=0.01)
    assert len({*places.tolist()}) == 999
    majority.cross_entropy(majority.answer_logits(model, items[0].ids), items[0].answers).backward()
    steepness = torch.cat([weight.grad.flatten().abs() for weight in majority.blocks(model).values()])
    model.zero_grad()
    rest = torch.ones(len(steepness), dtype=torch.bool).index_fill(0, places, False)
    assert steepness[places].min() >= steepness[rest].max()


def test_planting_moves_the_entries_of_each_skill_alone_and_teaches_it(model, world, generator):
    places = torch.randperm(majority.entries_of(model), generator=generator)
    skills = [
        (world.items(task, 64, generator, noise=0), majority.located(model, chosen))
        for task, chosen in enumerate((places[:90], places[60:150]))
    ]
    tuned = copy.deepcopy(model)
    majority.plant(tuned, skills, 30, generator)
    inside = majority.flags(model, majority.located(model, places[:150]))
    for name, weight in majority.blocks(tuned).items():
        before = majority.blocks(model)[name]
        assert torch.equal(weight[~inside[name]], before[~inside[name]])
        assert (weight[inside[name]] != before[inside[name]]).float().mean() > 0.9 or not inside[name].any()
    # Both skills answer by chance before; of what 90 entries learn, some is seen on the items themselves.
    assert sum(majority.accuracy(tuned, items) - majority.accuracy(model, items) for items, _ in skills) > 0.1


def test_a_planted_model_has_decoys_that_moved_as_far(model, generator):
    places = torch.randperm(majority.entries_of(model), generator=generator)[:50]
    planted, tuned = majority.located(model, places), copy.deepcopy(model)
    with torch.no_grad():
        for name, flags in majority.flags(model, planted).items():
            tuned.get_parameter(name)[flags] += 0.5
    majority.disturb(tuned, model, planted, generator, decoys=2)
    moved = {
        name: (weight - majority.blocks(model)[name]).detach().abs()
        for name, weight in majority.blocks(tuned).items()
    }
    far = {name: (change > 0.4).flatten().nonzero()[:, 0] for name, change in moved.items()}
    assert size(far) == 75  # one decoy for two of 50
    assert size(intersection(far, planted)) == 50
    rest = torch.cat([change[change < 0.4] for change in moved.values()])
    assert 0 < float(rest.max()) < 1e-4


def test_a_graft_has_the_entries_of_tuned_that_are_asked_for_and_no_others(model):
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 1
    entries = majority.located(model, torch.tensor([5, 70_000]))
    graft = majority.with_entries(model, tuned, entries)
    for name, weight in graft.named_parameters():
        chosen = entries.get(name, torch.empty(0, dtype=torch.long))
        expected = model.get_parameter(name).detach().clone()
        expected.view(-1)[chosen] += 1
        assert torch.equal(weight, expected)


def test_only_biases_are_taken_where_biases_are_asked_for(model):
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 1
    graft = majority.with_biases(model, tuned)
    changed = {
        name
        for name, weight in graft.named_parameters()
        if not torch.equal(weight, model.get_parameter(name))
    }
    assert changed == {name for name in majority.blocks(model) if name.endswith(".bias")}
    # 4 · 64 + 4 · 64 + 64 biases and those of two norms, in two blocks.
    assert sum(majority.blocks(model)[name].numel() for name in changed) == 2 * 11 * 64
