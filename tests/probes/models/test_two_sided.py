"""One model in memory is base, tuned or a selection of both, and leaves bit for bit as it came."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.checkpoints.opening import open_checkpoint
from probes.checkpoints.pair import CheckpointPair
from probes.checkpoints.prune import magnitude_order, random_order
from probes.errors import InputError
from probes.models.editable import Editable
from probes.models.two_sided import TwoSidedModel
from tests.probes.runnable import batch_of, make, state_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from peft import LoraConfig, get_peft_model

FAMILIES = ["llama", "gpt2", "gpt_neox", "olmoe", "mixtral", "gpt_oss"]


def tensors_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    """Bit for bit: -0 is not 0."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
        for name in first
        if first[name].ndim
    )


def logits(model):
    batch = batch_of(7, 5)
    with torch.no_grad():
        return model(input_ids=batch.ids, attention_mask=batch.attention_mask).logits


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    """A pair in files; some weights of base are -0.0, which no arithmetic would keep."""
    for seed, name in enumerate(("base", "tuned")):
        model = make(request.param, seed)
        if name == "base":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.view(-1)[::7] = -0.0
        model.save_pretrained(tmp_path / name)
    return CheckpointPair(tmp_path / "base", tmp_path / "tuned")


def test_it_is_either_side_bit_for_bit(pair):
    with TwoSidedModel(pair) as two_sided:
        sides = {"base": pair.base, "tuned": pair.tuned}
        for side in ("tuned", "base", "tuned", "base"):
            two_sided.become(side)
            assert same(tensors_of(two_sided.model), tensors_of(Editable(sides[side]).model))
    assert same(tensors_of(two_sided.model), tensors_of(Editable(pair.tuned).model))


def test_with_every_entry_of_the_other_side_it_is_the_other_side(pair):
    with TwoSidedModel(pair) as two_sided:
        every = {name: torch.arange(two_sided.headers[name].entries) for name in two_sided.in_both}
        wanted = {side: tensors_of(Editable(getattr(pair, side)).model) for side in ("base", "tuned")}
        for side, other in (("tuned", "base"), ("base", "tuned")):
            two_sided.become(side)
            with two_sided.selecting(every, other) as model:
                assert same(tensors_of(model), wanted[other])
            assert same(tensors_of(two_sided.model), wanted[side])


def test_a_selection_and_its_complement_with_the_sides_swapped_are_one_model(pair):
    generator = torch.Generator().manual_seed(0)
    with TwoSidedModel(pair) as two_sided:
        chosen, rest = {}, {}
        for name in two_sided.in_both:
            order = torch.randperm(two_sided.headers[name].entries, generator=generator)
            chosen[name], rest[name] = order[:5].sort().values, order[5:].sort().values
        two_sided.become("base")
        with two_sided.selecting(chosen, "tuned") as model:
            selected = tensors_of(model)
        two_sided.become("tuned")
        with two_sided.selecting(rest, "base") as model:
            assert same(selected, tensors_of(model))


def test_only_the_selected_entries_differ(pair):
    with TwoSidedModel(pair) as two_sided:
        two_sided.become("base")
        before = tensors_of(two_sided.model)
        index = {name: torch.tensor([0, 3]) for name in two_sided.in_both}
        with two_sided.selecting(index, "tuned") as model:
            seen = open_checkpoint(model)
            for name in two_sided.in_both:
                wanted = two_sided.read(name, "base").flatten().clone()
                wanted[[0, 3]] = two_sided.read(name, "tuned").flatten()[[0, 3]]
                assert torch.equal(seen.tensor(name).flatten(), wanted)
        assert same(before, tensors_of(two_sided.model))


def test_sparsity_zero_leaves_every_logit_and_what_is_pruned_is_zero(pair):
    with TwoSidedModel(pair) as two_sided:
        before = logits(two_sided.model)
        order = magnitude_order(pair.tuned)
        none, half = order.cuts([0.0, 0.5])
        for name in order.shapes:
            two_sided.zero(name, order.pruned(none, name))
        assert torch.equal(logits(two_sided.model), before)
        for name in order.shapes:
            two_sided.zero(name, order.pruned(half, name))
        seen = open_checkpoint(two_sided.model)
        for name in order.shapes:
            stored, pruned = pair.tuned.tensor(name), order.pruned(half, name)
            assert torch.equal(seen.tensor(name), stored.masked_fill(pruned, 0))
        assert not torch.equal(logits(two_sided.model), before)
        two_sided.restore()
        assert torch.equal(logits(two_sided.model), before)


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("scope", ["global", "block", "tensor"])
def test_rising_sparsities_zero_what_the_files_say(pair, side, scope):
    """Base has a seventh of its weights at -0: ties at 0 that a low cut divides."""
    grid = (0.05, 0.1, 0.3, 0.6)
    with TwoSidedModel(pair) as two_sided:
        two_sided.become(side)
        order = magnitude_order(pair.tuned, scope, read=lambda name: two_sided.read(name, side))
        cuts = order.cuts(grid)
        for cut in cuts:
            two_sided.prune(order, cut, rising=True)
            seen = open_checkpoint(two_sided.model)
            for name in order.shapes:
                stored = two_sided.read(name, side)
                assert torch.equal(seen.tensor(name), stored.masked_fill(cut.pruned(name, stored), 0))


def test_ties_are_divided_rising_as_they_are_in_the_files(tmp_path):
    for seed, name in enumerate(("base", "tuned")):
        model = make("llama", seed).bfloat16()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter * 4).round() / 4)  # of few values
        model.save_pretrained(tmp_path / name)
    with TwoSidedModel(CheckpointPair(tmp_path / "base", tmp_path / "tuned")) as two_sided:
        order = magnitude_order(two_sided.pair.tuned)
        for cut in order.cuts([0.2, 0.21, 0.22, 0.5, 0.51, 0.9]):
            two_sided.prune(order, cut, rising=True)
            zeros = {name: int((two_sided.model.state_dict()[name] == 0).sum()) for name in order.shapes}
            stored = {name: int((two_sided.read(name) == 0).sum()) for name in order.shapes}
            wanted = {
                n: int((cut.pruned(n, two_sided.read(n)) | (two_sided.read(n) == 0)).sum()) for n in stored
            }
            assert zeros == wanted
            assert any(cut.divides_ties(name) for name in order.shapes)


def test_an_order_drawn_at_random_is_pruned_by_it(pair):
    with TwoSidedModel(pair) as two_sided:
        order = random_order(pair.tuned, seed=3)
        (cut,) = order.cuts([0.4])
        two_sided.prune(order, cut)
        seen = open_checkpoint(two_sided.model)
        for name in order.shapes:
            assert torch.equal(seen.tensor(name) == 0, order.pruned(cut, name) | (two_sided.read(name) == 0))


def test_after_an_exception_it_is_tuned_again(pair):
    two_sided = TwoSidedModel(pair)
    before = tensors_of(two_sided.model)

    def fail():
        with two_sided:
            two_sided.become("base")
            two_sided.zero(
                next(iter(two_sided.headers)),
                torch.ones_like(two_sided.read(next(iter(two_sided.headers)))).bool(),
            )
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert same(tensors_of(two_sided.model), before)


def test_what_training_changed_is_put_back_once_it_is_told(pair):
    with TwoSidedModel(pair) as two_sided:
        before = tensors_of(two_sided.model)
        two_sided.become("base")
        two_sided.changed()
        with torch.no_grad():
            for parameter in two_sided.model.parameters():
                parameter.add_(1)
        two_sided.restore()
        assert same(tensors_of(two_sided.model), tensors_of(Editable(pair.base).model))
    assert same(tensors_of(two_sided.model), before)


def test_a_model_in_memory_is_never_written_to():
    base, tuned = make("llama", 0), make("llama", 1)
    states = [state_of(model) for model in (base, tuned)]
    with TwoSidedModel(CheckpointPair(base, tuned)) as two_sided:
        two_sided.become("base")
        name = next(iter(two_sided.headers))
        two_sided.zero(name, torch.ones(two_sided.headers[name].shape, dtype=torch.bool))
    for model, (tensors, modules, config) in zip((base, tuned), states, strict=True):
        after = state_of(model)
        assert all(torch.equal(tensor, after[0][name][0]) for name, (tensor, *_) in tensors.items())
        assert [rest for _, *rest in tensors.values()] == [rest for _, *rest in after[0].values()]
        assert config == after[2]
        assert modules.keys() == after[1].keys()


def test_tied_embeddings_are_one_tensor(tmp_path):
    for seed, name in enumerate(("base", "tuned")):
        make("llama", seed, tie_word_embeddings=True).save_pretrained(tmp_path / name)
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    with TwoSidedModel(pair) as two_sided:
        assert "lm_head.weight" not in two_sided.headers
        with two_sided.selecting({"model.embed_tokens.weight": torch.tensor([0])}, "base") as model:
            assert model.lm_head.weight is model.model.embed_tokens.weight
            assert model.lm_head.weight[0, 0] == pair.base.tensor("model.embed_tokens.weight")[0, 0]


def test_sides_of_other_dtypes_are_both_held_exactly(tmp_path):
    make("llama", 0).save_pretrained(tmp_path / "base")
    make("llama", 1).bfloat16().save_pretrained(tmp_path / "tuned")
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    with TwoSidedModel(pair) as two_sided:
        assert two_sided.model.dtype == torch.float32
        two_sided.become("base")
        assert same(tensors_of(two_sided.model), tensors_of(Editable(pair.base).model))


def test_an_adapters_merged_weights_are_rounded_once(tmp_path):
    make("llama", 0).bfloat16().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(make("llama", 0).bfloat16(), config).save_pretrained(tmp_path / "tuned")
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    with TwoSidedModel(pair) as two_sided:
        before = tensors_of(two_sided.model)
        assert same(before, tensors_of(Editable(pair.tuned).model))
        two_sided.become("base")
        assert same(tensors_of(two_sided.model), tensors_of(Editable(pair.base).model))
    assert same(tensors_of(two_sided.model), before)


def test_a_head_that_base_lacks_stays_tuneds(tmp_path):
    make("llama", 0).save_pretrained(tmp_path / "base")
    make("llama_classes", 1).save_pretrained(tmp_path / "tuned")
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    with TwoSidedModel(pair) as two_sided:
        assert set(two_sided.headers) - two_sided.in_both == {"score.weight"}
        two_sided.become("base")
        held = two_sided.model.state_dict()
        assert torch.equal(held["score.weight"], pair.tuned.tensor("score.weight"))
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(held[name], pair.base.tensor(name))


def test_of_a_resized_vocabulary_the_rows_that_base_lacks_stay_tuneds(tmp_path):
    make("llama", 0).save_pretrained(tmp_path / "base")
    make("llama", 1, vocab_size=44).save_pretrained(tmp_path / "tuned")
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    with TwoSidedModel(pair) as two_sided:
        two_sided.become("base")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            held = two_sided.model.state_dict()[name]
            assert torch.equal(held[:41], pair.base.tensor(name))
            assert torch.equal(held[41:], pair.tuned.tensor(name)[41:])


def test_the_gradient_at_an_entry_is_found_where_the_entry_lives(pair):
    """Slots point at parameters, and hold what the file holds at these entries."""
    with TwoSidedModel(pair) as two_sided:
        parameters = {id(parameter) for parameter in two_sided.model.parameters()}
        for name in two_sided.in_both:
            index = torch.tensor([1, 2])
            for slot in two_sided.editable.slots(name, index):
                assert id(slot.tensor) in parameters
                held = slot.tensor.detach().view(-1)[slot.indices]
                assert torch.equal(held, two_sided.read(name).flatten()[index][slot.which])


def test_an_unknown_tensor_is_refused(pair):
    with pytest.raises(LookupError, match="has no tensor 'nonsense' that the model runs with"):
        TwoSidedModel(pair).read("nonsense")


@settings(max_examples=20)
@given(
    st.lists(st.sampled_from(["base", "tuned", "zero", "write", "restore"]), max_size=6), st.integers(0, 99)
)
def test_whatever_is_done_to_it_it_leaves_as_tuned(steps, seed):
    generator = torch.Generator().manual_seed(seed)
    pair = CheckpointPair(SHARED["base"], SHARED["tuned"])
    with TwoSidedModel(pair) as two_sided:
        before = tensors_of(two_sided.model)
        for step in steps:
            name = sorted(two_sided.headers)[
                int(torch.randint(len(two_sided.headers), (), generator=generator))
            ]
            if step == "zero":
                two_sided.zero(name, torch.rand(two_sided.headers[name].shape, generator=generator) < 0.5)
            elif step == "write":
                two_sided.write(name, torch.tensor([0]), torch.tensor([7.0]))
            elif step == "restore":
                two_sided.restore()
                assert same(tensors_of(two_sided.model), tensors_of(SHARED[two_sided.side]))
            else:
                two_sided.become(step)
    assert same(tensors_of(two_sided.model), before)


SHARED = {"base": make("llama", 0), "tuned": make("llama", 1)}


def under_another_epsilon(tmp_path):
    """A pair in directories whose two configurations give two functions."""
    for name, seed, eps in (("base", 0, 1e-6), ("tuned", 1, 1.0)):
        model = make("llama", seed)
        model.config.rms_norm_eps = eps
        model.save_pretrained(tmp_path / name)
    return CheckpointPair(tmp_path / "base", tmp_path / "tuned")


def test_sides_of_two_functions_are_models_of_their_own_and_come_back_bit_for_bit(tmp_path):
    pair, batch = under_another_epsilon(tmp_path), batch_of(6)
    expected = {
        side: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / side).eval()(batch.ids).logits
        for side in ("base", "tuned")
    }
    with TwoSidedModel(pair, apart=True) as two_sided:
        for side in ("tuned", "base", "tuned"):
            two_sided.become(side)
            assert torch.equal(two_sided.model(batch.ids).logits, expected[side])
            name = "model.layers.0.mlp.up_proj.weight"
            assert torch.equal(two_sided.read(name, side), getattr(pair, side).tensor(name))
            two_sided.zero(name, torch.ones_like(two_sided.read(name), dtype=torch.bool))
            assert not torch.equal(two_sided.model(batch.ids).logits, expected[side])
            two_sided.restore()
            assert torch.equal(two_sided.model(batch.ids).logits, expected[side])
            # Training changes every parameter, also those that have no counterpart.
            two_sided.changed()
            for parameter in two_sided.model.parameters():
                parameter.data.zero_()
            two_sided.restore()
            assert torch.equal(two_sided.model(batch.ids).logits, expected[side])


def test_one_model_is_never_both_sides_of_two_functions(tmp_path):
    with pytest.raises(InputError, match=r"differ in rms_norm_eps \(1e-06 and 1\), so base does not run in"):
        TwoSidedModel(under_another_epsilon(tmp_path))
