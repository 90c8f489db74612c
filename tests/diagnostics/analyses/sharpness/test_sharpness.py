"""Planted stragglers are found, repaired and realigned; sharpness is measured, and never called a fault."""

import copy
import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from diagnostics.analyses.sharpness.analysis import layer_sharpness
from diagnostics.analyses.sharpness.ascent import PerturbedLoss, worst
from diagnostics.analyses.sharpness.curvature import HessianProduct, spectrum
from diagnostics.analyses.sharpness.layer_sharpness import (
    BatchLoss,
    RowBatch,
    SharpnessSettings,
    batch_sharpness,
    mean_over_batches,
    row_batches,
)
from diagnostics.analyses.sharpness.tables import best_remedy
from diagnostics.core.policy import default_policy
from diagnostics.evaluation.row_losses import EncodedTask
from probes import CheckpointPair
from probes.models.interpolated import layers_of
from probes.models.perturb import PerturbedWeights
from probes.passes.objective import Objective
from probes.text.batches import Example
from probes.text.rows import task_of
from tests.diagnostics.chains import save_tokenizer
from tests.diagnostics.shell import shell
from tests.probes.runnable import assert_same, state_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

LETTERS, LAYERS = "abcdefgh", 4
QUICK = {
    "alphas": (0.0, 0.25, 0.5, 0.75, 1.0), "layer_alphas": (0.0, 0.5, 1.0), "rhos": (0.1, 0.2), "rho": 0.1,
    "steps": 3, "pairs": 1, "batches": 2, "batch_rows": 4,
}  # fmt: skip


def model_of(seed=0, **settings):
    """A Llama whose layers matter: its weights are large."""
    config = transformers.LlamaConfig(
        vocab_size=len(LETTERS) + 1, hidden_size=24, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=False, **settings,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                size = 1.0 if "layers" in name else 0.7
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(size * noise / parameter.shape[1] ** 0.5)
        model.lm_head.weight.mul_(4)
    return model


def moved(model, size, seed=5):
    """All weights moved by noise in proportion to their size."""
    other = model_of()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for target, source in zip(other.parameters(), model.parameters(), strict=True):
            target.copy_(source + size * source.abs().mean() * torch.randn(source.shape, generator=generator))
    return other


def planted(model, layer, kind):
    """The same function with one block relabelled."""
    other = model_of()
    other.load_state_dict(model.state_dict())
    block = other.model.layers[layer]
    with torch.no_grad():
        if kind == "signs":
            for matrix in (block.self_attn.v_proj, block.self_attn.o_proj):
                matrix.weight.neg_()
        elif kind == "neurons":
            order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
            for matrix in (block.mlp.up_proj, block.mlp.gate_proj):
                matrix.weight.copy_(matrix.weight[order])
            block.mlp.down_proj.weight.copy_(block.mlp.down_proj.weight[:, order])
    return other


def save(directory, model):
    model.save_pretrained(directory)
    save_tokenizer(directory, LETTERS)
    return directory


def written(model, count, length=14, seed=0):
    """Texts that the model itself writes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(count, 1, dtype=torch.long)
    with torch.no_grad():
        while ids.shape[1] <= length:
            chances = model(ids).logits[:, -1, 1:].softmax(-1)
            ids = torch.cat([ids, 1 + torch.multinomial(chances, 1, generator=generator)], dim=1)
    return ["".join(LETTERS[token - 1] for token in row[1:]) for row in ids.tolist()]


@pytest.fixture(scope="module")
def models():
    base = model_of()
    tuned = moved(base, 0.02)
    return base, tuned, written(tuned, 16), written(base, 16, seed=1)


@pytest.fixture(scope="module", params=[(0, "signs"), (1, "neurons")], ids=str)
def plant(request, models, tmp_path_factory):
    """Base, tuned with a plant, and what is found between them."""
    base, tuned, task, ood = models
    root = tmp_path_factory.mktemp("plant")
    layer, kind = request.param
    pair = CheckpointPair(save(root / "base", base), save(root / "tuned", planted(tuned, layer, kind)))
    plain = CheckpointPair(root / "base", save(root / "plain", tuned))
    quick = {**QUICK, "curvature": False}
    result = layer_sharpness(pair, task, ood=ood, **quick)
    unplanted = layer_sharpness(plain, task, ood=ood, **{**quick, "rhos": (0.1,), "batches": 1, "pairs": 0})
    return layer, kind, result, unplanted


def rows_of_batch(model, layers, batch, settings):
    """Sharpness of layers on one batch."""
    return mean_over_batches(layers, [batch_sharpness(model, layers, batch, 0, settings, joint=False)])


def losses(result, role="ood"):
    path = result.tables["path"]
    part = path[(path["role"] == role) & (path["metric"] == "loss")]
    return part.set_index("alpha")["value"]


def test_the_planted_block_is_the_only_straggler(plant):
    layer, _, result, plain = plant
    layers = result.tables["layers"]
    assert layers.loc[layers["straggler"], "name"].tolist() == [f"block {layer}"]
    assert result.metrics["stragglers"] == 1
    assert plain.metrics["stragglers"] == 0
    assert len(layers) == LAYERS + 2
    others = layers[layers["name"] != f"block {layer}"]
    assert others["barrier"].max() < 0.05 < layers["barrier"].max()
    assert f"stragglers: block {layer}" in result.summary()
    assert "no straggler" in plain.summary()


def test_a_plant_leaves_both_ends_as_they_are_and_makes_a_strong_failure_between_them(plant):
    _, kind, result, plain = plant
    planted_losses, plain_losses = losses(result), losses(plain)
    for end in (0.0, 1.0):
        assert planted_losses[end] == pytest.approx(plain_losses[end], abs=0 if kind == "signs" else 1e-5)
    assert result.metrics["strong_failures"] == 1
    assert result.metrics["barrier_nats"] > 0.1
    assert plain.metrics["strong_failures"] == 0
    severities = {finding.metric: finding.severity for finding in result.findings(default_policy())}
    assert severities == {"strong_failures": "fail", "stragglers": "warn"}


def test_pinning_the_plant_repairs_the_hole_and_pinning_another_layer_does_not(plant):
    layer, _, result, _ = plant
    layers = result.tables["layers"].set_index("name")
    repairs = layers[["repair_base", "repair_tuned"]]
    repaired = repairs.loc[f"block {layer}"]
    assert (repaired > 0.7 * result.metrics["barrier_nats"]).all()
    assert repairs.drop(index=f"block {layer}").to_numpy().max() < 0.2 * repaired.max()
    assert result.metrics["repaired_nats"] == repaired.max()


def test_realigning_restores_the_plain_path(plant):
    layer, kind, result, plain = plant
    remedies = result.tables["remedies"].set_index(["remedy", "setting", "alpha", "role"])["loss"]
    for alpha in (0.5, 1.0):
        for role in ("task", "ood"):
            expected = losses(plain, role)[alpha]
            loss = remedies["realign", "", alpha, role]
            assert loss == pytest.approx(expected, abs=0 if kind == "signs" else 1e-6), (alpha, role)
    row = result.tables["layers"].set_index("name").loc[f"block {layer}"]
    assert row["action"] == "realign"
    worst = result.metrics["worst_alpha"]
    untouched = remedies["none", "", worst, "ood"]
    assert row["action_barrier_nats"] == pytest.approx(remedies["realign", "", worst, "ood"] - untouched)
    assert any("Best remedy" in note and "`realign`" in note for note in result.notes)


def test_every_remedy_is_measured_on_every_set_and_none_changes_what_is_beyond_it(plant):
    layer, _, result, _ = plant
    remedies = result.tables["remedies"]
    label = (remedies["remedy"] + " " + remedies["setting"]).str.strip()
    assert set(label) == {
        "none", "pin base", "pin tuned", "realign", "sparse_delta 0.5", "sparse_delta 0.7",
        "sparse_delta 0.9", "sparse_weight 0.5", "sparse_weight 0.7",
    }  # fmt: skip
    keyed = remedies.assign(label=label).set_index(["label", "alpha", "role"])["loss"]
    path_losses = losses(result)
    for alpha in (0.5, 1.0):
        assert keyed["none", alpha, "ood"] == path_losses[alpha]
    assert keyed["pin tuned", 1.0, "ood"] == path_losses[1.0]
    rows = result.tables["layer_paths"]
    rewound = rows[(rows["layer"] == layer) & (rows["anchor"] == "tuned") & (rows["alpha"] == 0)][
        "loss"
    ].iloc[0]
    assert keyed["pin base", 1.0, "ood"] == pytest.approx(rewound, abs=1e-12)


def test_layer_paths_begin_and_end_at_the_ends(plant):
    _, _, result, _ = plant
    path_losses, paths = losses(result), result.tables["layer_paths"]
    at = paths.set_index(["anchor", "alpha", "layer"])["loss"].sort_index()
    assert (at["tuned", 1.0] == path_losses[1.0]).all()
    assert (at["base", 0.0] == path_losses[0.0]).all()
    layers = result.tables["layers"].set_index("layer")
    for layer in layers.index:
        assert layers.loc[layer, "rewind_cost"] == pytest.approx(
            at["tuned", 0.0, layer] - path_losses[1.0], abs=1e-9
        )
        curve = at["tuned"].xs(layer, level="layer")
        excess = curve[0.5] - (curve[0.0] + curve[1.0]) / 2
        assert layers.loc[layer, "barrier_tuned"] == pytest.approx(max(0, excess), abs=1e-9)


def test_the_whole_is_at_least_as_sharp_as_each_block_and_no_value_falls_with_the_radius(plant):
    _, _, result, _ = plant
    table = result.tables["sharpness"]
    assert (table["worst"] >= table["single"]).all()
    assert (table["single"] >= 0).all()
    for keys, part in table.groupby(["alpha", "rho"]):
        blocks = part[part["name"].str.startswith("block")]
        joint = part.loc[part["name"] == "all blocks", "worst"]
        if len(joint):
            assert joint.iloc[0] >= blocks["worst"].max() - 1e-12, keys
    for _, part in table.groupby(["alpha", "name"]):
        assert part.sort_values("rho")["worst"].is_monotonic_increasing
    layers = result.tables["layers"]
    assert layers[["sharpness_base", "sharpness_tuned"]].notna().all(axis=None)
    assert result.metrics["sharpness_tuned"] >= layers.loc[1:LAYERS, "sharpness_tuned"].max()


def test_no_word_calls_a_model_worse_because_it_is_sharper(plant):
    _, _, *results = plant
    from diagnostics.core.registry import find

    record = find("sharpness")
    texts = [record.question, record.reading, *record.metrics.values()]
    for result in results:
        texts += [*result.notes, result.summary()]
        texts += [figure.layout.title.text for figure in result.figures().values()]
    texts += [rule["message"] for rule in default_policy().plain()["sharpness"].values()]
    for text in texts:
        for sentence in re.split(r"(?<=[.;:])\s", text):
            if re.search(r"sharp", sentence, re.I):
                blamed = re.search(r"\b(worse|bad|risk|fragile|unsafe|danger\w*|poor\w*|fault)\b", sentence)
                denied = re.search(r"\b(not|no|never|nothing)\b", sentence)
                assert not blamed or denied, sentence
    assert not [metric for metric in default_policy().plain()["sharpness"] if metric.startswith("sharpness")]


def test_every_picture_is_drawn(plant):
    _, _, result, plain = plant
    names = ["path", "single", "barriers", "by_layer", "by_radius"]
    assert list(result.figures()) == [*names, "remedies"]
    assert list(plain.figures()) == names  # nothing to mend


def test_a_model_with_itself_has_no_barriers_and_nothing_to_repair(models, tmp_path):
    base, _, task, ood = models
    checkpoint = save(tmp_path / "base", base)
    result = layer_sharpness(CheckpointPair(checkpoint, checkpoint), task, ood=ood, curvature=False, **QUICK)
    layers = result.tables["layers"]
    for column in ("barrier", "displacement", "rewind_cost", "repair_base", "repair_tuned", "control_rise"):
        assert (layers[column] == 0).all(), column
    assert result.metrics["barrier_nats"] == result.metrics["stragglers"] == 0
    path = result.tables["path"]
    assert (path.loc[path["metric"].isin(["fft", "ttf"]), "value"] == 0).all()
    assert layers["sharpness_base"].tolist() == layers["sharpness_tuned"].tolist()


def test_a_model_in_memory_is_left_bit_for_bit_and_said_to_be_run_without_dropout(models):
    base, tuned, task, _ = models
    in_memory = moved(tuned, 0.0).train()
    states = [state_of(source) for source in (base, in_memory)]
    pair = CheckpointPair(base, in_memory)
    with pytest.raises(ValueError, match="tokenizer"):
        layer_sharpness(pair, task, **QUICK)  # a module has none
    for model, state in zip((base, in_memory), states, strict=True):
        assert_same(state, state_of(model))


def test_results_are_the_same_for_a_seed_and_do_not_know_the_size_of_a_pass(models, tmp_path):
    base, tuned, task, _ = models
    pair = CheckpointPair(save(tmp_path / "base", base), save(tmp_path / "tuned", tuned))
    quick = {**QUICK, "alphas": (0.5,), "rhos": (0.1,), "batches": 1, "pairs": 0, "curvature": False}
    first, second, small = (
        layer_sharpness(pair, task, **{**quick, "batch_tokens": tokens}) for tokens in (16384, 16384, 40)
    )
    for name, table in first.tables.items():
        assert table.equals(second.tables[name]), name
    for column in ("barrier", "sharpness_base", "sharpness_tuned", "rewind_cost"):
        a, b = (result.tables["layers"][column].to_numpy() for result in (first, small))
        assert a == pytest.approx(b, abs=2e-5, rel=2e-2), column


@pytest.mark.parametrize(
    ("error", "noted"),
    [
        (RuntimeError("derivative for aten::flash_backward is not implemented"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), False),
    ],
)
def test_curvature_is_left_out_only_where_torch_has_no_second_derivative(
    models, tmp_path, monkeypatch, error, noted
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(HessianProduct, "product", fail)
    base, tuned, task, _ = models
    pair = CheckpointPair(save(tmp_path / "base", base), save(tmp_path / "tuned", tuned))
    quick = {**QUICK, "alphas": (0.5,), "rhos": (0.1,), "steps": 2, "batches": 1, "pairs": 0}
    if not noted:
        with pytest.raises(type(error), match=re.escape(str(error))):
            layer_sharpness(pair, task[:4], **quick)
        return
    result = layer_sharpness(pair, task[:4], **quick)
    assert result.tables["curvature"].empty
    (note,) = (note for note in result.notes if "differentiated twice" in note)
    assert "aten::flash_backward" in note


def test_curvature_predicts_the_rise_at_a_minimum():
    model = model_of()
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(LETTERS), 16)) for _ in range(40)]
    examples = [
        Example(
            ids=[0, *(1 + LETTERS.index(letter) for letter in text)], scored=[False] + [True] * 16, row=row
        )
        for row, text in enumerate(texts)
    ]
    task = EncodedTask(
        task=task_of(texts), examples=examples, classes=(), mask_id=None, batch_tokens=9999, notes=()
    )
    ids = torch.tensor([example.ids for example in examples])
    head = layers_of(model)[-1]
    assert head.name == "head"
    # Its own best: what is behind the blocks, trained to the end on these rows.
    model.requires_grad_(False)
    for parameter in head.parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        head.parameters, max_iter=300, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        nats = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        nats.backward()
        return nats

    optimizer.step(loss)
    model.requires_grad_(False)
    settings = SharpnessSettings(rhos=(0.02,), normalise=False, steps=40, pairs=50)
    batch = RowBatch(Objective(task), tuple(range(40)))
    (row,) = rows_of_batch(model, [head], batch, settings)
    with PerturbedWeights(head.parameters) as moved:
        product = HessianProduct(model, task, batch.rows, moved).product
        estimate = spectrum(product, moved.zero, probes=40, generator=torch.Generator().manual_seed(0))
    assert row["slope"] < 1e-3 * estimate.top
    assert row["worst"] == pytest.approx(0.02**2 * estimate.top / 2, rel=0.03)
    errors = row["average_error"], 0.02**2 / 2 * estimate.trace_error
    assert abs(row["average"] - 0.02**2 * estimate.trace / 2) < 4 * math.hypot(*errors)
    assert estimate.bottom > -1e-3 * estimate.top  # a minimum


@pytest.mark.parametrize("adaptive", [True, False])
def test_rises_are_those_of_a_naive_ascent_with_full_passes(adaptive):
    model = model_of()
    examples = [
        Example(ids=[0, *row], scored=[False] + [True] * len(row), row=index)
        for index, row in enumerate([[1, 2, 3, 4], [5, 6, 7], [8, 1, 1, 2]])
    ]
    task = EncodedTask(
        task=task_of(["a", "b", "c"]), examples=examples, classes=(), mask_id=None, batch_tokens=99, notes=()
    )
    layer = layers_of(model)[3]  # block 2
    settings = SharpnessSettings(rhos=(0.3,), steps=2, pairs=1, adaptive=adaptive)
    (row,) = rows_of_batch(model, [layer], RowBatch(Objective(task), (0, 1, 2)), settings)
    # The single step of the page in float64: u = ρ c∇L / ‖c∇L‖, logits normalised.
    double = model.double()
    parameters = list(double.model.layers[2].parameters())

    def nats():
        total, count = 0.0, 0
        for example in examples:
            logits = double(torch.tensor([example.ids])).logits[0, :-1]
            logits = logits - logits.mean(dim=1, keepdim=True)
            logs = (logits / logits.norm(dim=1, keepdim=True)).log_softmax(dim=1)
            total = total - logs[range(len(example.ids) - 1), example.ids[1:]].sum()
            count += len(example.ids) - 1
        return total / count

    before = nats()
    slopes = torch.autograd.grad(before, parameters)
    scales = [
        parameter.detach().abs() if adaptive else torch.ones_like(parameter) for parameter in parameters
    ]
    size = sum(((c * g) ** 2).sum().item() for c, g in zip(scales, slopes, strict=True)) ** 0.5
    with torch.no_grad():
        for parameter, c, g in zip(parameters, scales, slopes, strict=True):
            parameter += c * (0.3 * c * g / size)
        after = nats()
    assert row["loss"] == pytest.approx(before.item(), abs=1e-6)
    assert row["slope"] == pytest.approx(size, rel=1e-4)
    assert row["single"] == pytest.approx((after - before).item(), abs=2e-6)
    assert row["worst"] >= row["single"]


def test_a_layers_path_never_rises_above_plain_sharpness_at_tuned_within_its_displacement():
    base, tuned = model_of(), moved(model_of(), 0.3)
    examples = [Example(ids=[0, 1, 2, 3, 4], scored=[False] + [True] * 4, row=0)]
    task = EncodedTask(
        task=task_of(["a"]), examples=examples, classes=(), mask_id=None, batch_tokens=99, notes=()
    )
    tuned.requires_grad_(False)
    ours, theirs = (layers_of(model)[2].parameters for model in (base, tuned))
    back = torch.cat(
        [
            (base_weight - tuned_weight).detach().flatten()
            for base_weight, tuned_weight in zip(ours, theirs, strict=True)
        ]
    )
    with PerturbedWeights(theirs, adaptive=False) as moved_:
        slope = BatchLoss(tuned, RowBatch(Objective(task), (0,)), moved_)
        zero = PerturbedLoss(moved_.zero, *slope(moved_.zero))
        for alpha in (0.25, 0.5, 0.75):
            u = (1 - alpha) * back  # from tuned to the layer's place at alpha
            rho = float(u.double().norm())
            there = PerturbedLoss(u, *slope(u))
            ascent = worst(
                slope, zero, rho, steps=3, generator=torch.Generator().manual_seed(0), warm=[there]
            )
            assert there.loss - zero.loss <= ascent.rise


def test_a_layer_is_as_sharp_whatever_is_measured_beside_it_and_before_it():
    model = model_of().requires_grad_(False)
    examples = [Example(ids=[0, 3, 1, 4, 1, 5], scored=[False] + [True] * 5, row=row) for row in range(2)]
    task = EncodedTask(
        task=task_of(["a", "b"]), examples=examples, classes=(), mask_id=None, batch_tokens=99, notes=()
    )
    batch = RowBatch(Objective(task), (0, 1))
    settings = SharpnessSettings(rhos=(0.1, 0.3), steps=3, pairs=1)
    layers = layers_of(model)

    def sharpness_of(chosen, settings):
        rows = rows_of_batch(model, chosen, batch, settings)
        return {(row["name"], row["rho"]): (row["worst"], row["average"]) for row in rows}

    every = sharpness_of(layers, settings)
    assert sharpness_of(layers[::-1], settings) == every
    assert sharpness_of(layers, replace(settings, cached=False)) == every
    assert sharpness_of(layers[2:3], settings).items() <= every.items()


def test_batches_hold_each_row_once_and_are_of_one_size():
    examples = [Example(ids=[0, 1], scored=[False, True], row=row) for row in range(11)]
    task = EncodedTask(
        task=task_of(["a"] * 11), examples=examples, classes=(), mask_id=None, batch_tokens=99, notes=()
    )
    drawn = row_batches([Objective(task), Objective(task)], 10, 4, seed=0)
    # two full batches of each task; what is left of 11 rows would be a smaller one
    assert [len(batch.rows) for batch in drawn] == [4] * 4
    for turn in (0, 1):
        rows = [row for batch in drawn[turn::2] for row in batch.rows]
        assert len(set(rows)) == 8
    assert len(row_batches([Objective(task)], 1, 4, seed=0)) == 1
    assert [len(batch.rows) for batch in row_batches([Objective(task)], 3, 50, seed=0)] == [11]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rhos": (0.0, 0.5)}, "rhos holds 0.0; a radius is above 0"),
        ({"rhos": (0.5,), "rho": -1.0}, "a radius is above 0"),
        ({"rho": 0.3}, r"rho is 0.3, which is not in rhos"),
        ({"norm": "linf"}, "starts is 1; with norm linf a single start may find less than half"),
        ({"steps": 1}, "steps is 1; at least 2"),
        ({"batches": 0}, "batches is 0; at least 1"),
        ({"alphas": (2.0,)}, "alphas holds 2.0; they go from 0, base, to 1, tuned"),
    ],
)
def test_settings_that_make_no_sense_are_refused(models, settings, message):
    base, tuned, task, _ = models
    with pytest.raises(ValueError, match=re.escape(message) if "(" not in message else message):
        layer_sharpness(CheckpointPair(base, tuned), task, **settings)


def test_half_precision_is_refused_because_small_steps_vanish_in_it(models, tmp_path):
    checkpoint = save(tmp_path / "base", copy.deepcopy(models[0]).bfloat16())
    with pytest.raises(ValueError, match=r"in half precision .*; set sharpness\.dtype to float32"):
        layer_sharpness(CheckpointPair(checkpoint, checkpoint), models[2], dtype=None)


def test_a_model_asked_for_in_half_precision_runs_in_float32_and_a_note_says_so(models, tmp_path):
    pair = CheckpointPair(*(save(tmp_path / str(i), model) for i, model in enumerate(models[:2])))
    few = {**QUICK, "alphas": (0.5,), "rhos": (0.1,), "batches": 1, "pairs": 0, "curvature": False}
    full, half = (layer_sharpness(pair, models[2], dtype=dtype, **few) for dtype in (None, "bfloat16"))
    assert half.metrics == full.metrics
    assert [note for note in half.notes if note not in full.notes] == [
        "The model was run in float32: in bfloat16 small perturbations change no weight."
    ]


def test_an_audit_without_a_task_skips_it_and_says_what_it_needs(models, tmp_path, monkeypatch, capsys):
    base, tuned, _, _ = models
    places = [save(tmp_path / name, model) for name, model in (("base", base), ("tuned", tuned))]
    code = shell(monkeypatch, "audit", *places, "--only", "sharpness", "--out", tmp_path / "audit")
    output = capsys.readouterr()
    assert code == 2
    assert "--task F" in output.err + output.out


def test_of_remedies_that_are_alike_the_one_that_keeps_both_ends_is_named():
    import pandas as pd

    def table(**losses):
        rows = [
            {"remedy": name.partition("-")[0], "setting": name.partition("-")[2], "alpha": 0.5, "role": role,
             "set": role, "loss": loss + (role == "task"), "accuracy": 0.0}
            for name, loss in losses.items() for role in ("ood", "task")
        ]  # fmt: skip
        return pd.DataFrame(rows)

    alike = table(none=3.0, **{"sparse_delta-0.9": 1.0, "pin-base": 1.01, "realign": 1.019})
    assert best_remedy(alike, 0.5, {"ood"})[0] == "realign"
    name, change, cost = best_remedy(alike[alike["remedy"] != "realign"], 0.5, {"ood"})
    assert (name, change, cost) == ("pin base", pytest.approx(-1.99), pytest.approx(-1.99))
    worse = table(none=3.0, **{"sparse_delta-0.9": 1.0, "pin-base": 1.3, "realign": 1.4})
    assert best_remedy(worse, 0.5, {"ood"})[0] == "sparse_delta 0.9"
    assert best_remedy(alike, 0.7, {"ood"})[0] == ""
    assert math.isnan(best_remedy(alike, 0.7, {"ood"})[1])
