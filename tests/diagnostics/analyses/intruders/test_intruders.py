"""Intruder dimensions: the paper's definition, its invariants, and PEFT's detector as an outside oracle."""

import math

import joblib
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnostics.analyses.intruders import decide as tiers
from diagnostics.analyses.intruders.analysis import _check, intruder_dimensions
from diagnostics.analyses.intruders.decide import decide_exactly
from diagnostics.numerics import linalg
from probes import CheckpointPair
from tests.diagnostics.spectra import KINDS, orthonormal, values, with_values

SHAPES = ((64, 64), (48, 90), (90, 48))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def reference(base, tuned, k=10, epsilon=0.5):
    """Algorithm 1 of arXiv:2410.21228 as it is written, in float64."""
    U0 = torch.linalg.svd(base.double(), full_matrices=False).U
    U1 = torch.linalg.svd(tuned.double(), full_matrices=False).U[:, :k]
    return int(((U0.mT @ U1).abs().amax(dim=0) < epsilon).sum())


def cosines(base, tuned, k=10):
    return decide_exactly(base, tuned, k).low


def state(matrices):
    """A state dict whose matrices are query projections of successive layers."""
    return {f"model.layers.{i}.self_attn.q_proj.weight": W for i, W in enumerate(matrices)}


def count(base, tuned, **parameters):
    return intruder_dimensions(CheckpointPair(state([base]), state([tuned])), **parameters).metrics[
        "intruders"
    ]


def spiked(base, sizes, generator):
    """Base plus rank-one spikes at random, sized in its largest singular value."""
    scale = torch.linalg.matrix_norm(base, 2)
    for size in sizes:
        u, v = (orthonormal(n, 1, generator).to(base.dtype) for n in base.shape)
        base = base + size * scale * u @ v.mT
    return base


@given(seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS), shape=st.sampled_from(SHAPES))
@settings(max_examples=40)
def test_a_matrix_compared_with_itself_has_cosines_of_one(seed, kind, shape):
    W, _, _ = with_values(values(kind, min(shape)), *shape, seeded(seed))
    assert cosines(W, W.clone(), 8) == pytest.approx([1.0] * 8, abs=1e-12)


@pytest.mark.parametrize("noise", [0, 1e-12, 1e-9])
def test_a_degenerate_base_has_no_false_intruders(noise):
    Q = orthonormal(48, 48, seeded(0))
    assert cosines(Q, Q + noise * torch.randn(48, 48, generator=seeded(1), dtype=Q.dtype)).min() > 0.9


@given(
    seed=st.integers(0, 2**31), factor=st.sampled_from([1e-3, 0.5, 7.0, -1.0]), shape=st.sampled_from(SHAPES)
)
@settings(max_examples=30)
def test_scaling_by_any_factor_and_sign_adds_nothing(seed, factor, shape):
    W, _, _ = with_values(values("geometric", min(shape)), *shape, seeded(seed))
    assert cosines(W, factor * W, 8) == pytest.approx([1.0] * 8, abs=1e-9)


@pytest.mark.parametrize(("size", "rank"), [(0.5, None), (2.5, 4), (9.0, 1)])
def test_an_orthogonal_spike_is_the_one_intruder_where_it_enters(size, rank):
    # Base of values 5, 4, 3, 2, 1: a spike orthogonal to all has rank 1 + #{s > size}, if that is <= 4.
    generator = seeded(2)
    U, V = orthonormal(40, 6, generator), orthonormal(60, 6, generator)
    S = torch.tensor([5.0, 4, 3, 2, 1], dtype=torch.float64)
    base = (U[:, :5] * S) @ V[:, :5].mT
    tuned = base + size * U[:, 5:] @ V[:, 5:].mT
    decision = decide_exactly(base, tuned, 4)
    expected = [1.0] * 4
    if rank is not None:
        expected[rank - 1] = 0.0
        assert decision.singular_values[rank - 1] == pytest.approx(size)
    assert decision.low == pytest.approx(expected, abs=1e-10)


@given(seed=st.integers(0, 2**31), gaussian=st.booleans())
@settings(max_examples=30)
def test_a_large_random_spike_is_an_intruder_and_the_only_one_where_values_are_apart(seed, gaussian):
    generator = seeded(seed)
    if gaussian:
        base = torch.randn(128, 160, generator=generator, dtype=torch.float64)
    else:
        base, _, _ = with_values(0.96 ** torch.arange(128), 128, 160, generator)
    new = cosines(base, spiked(base, [1.6], generator)) < 0.5
    assert new[0]
    # Values as close as Gaussian ones let their vectors turn into each other at the least push.
    if not gaussian:
        assert new.sum() == 1


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20)
def test_permuting_and_rotating_the_outputs_of_both_changes_nothing(seed):
    generator = seeded(seed)
    base, _, _ = with_values(values("geometric", 48), 48, 90, generator)
    tuned = spiked(base, [0.8, 0.5], generator)
    before = cosines(base, tuned)
    order = torch.randperm(48, generator=generator)
    assert cosines(base[order], tuned[order]) == pytest.approx(before, abs=1e-9)
    Q = orthonormal(48, 48, generator)
    assert cosines(Q @ base, Q @ tuned) == pytest.approx(before, abs=1e-9)


def test_counts_grow_with_epsilon_and_with_k_and_lie_below_their_bound():
    generator = seeded(4)
    base, _, _ = with_values(values("power", 96), 96, 128, generator)
    tuned = spiked(base, [0.9, 0.5, 0.4], generator) + 0.02 * torch.randn(96, 128, generator=generator)
    pair = CheckpointPair(state([base, base]), state([tuned, base]))
    sweep = intruder_dimensions(pair, sweep=True).tables["sweep"]
    assert (sweep["intruders_low"] == sweep["intruders_high"]).all()  # exact: nothing is left open
    grid = sweep.pivot(index="k", columns="epsilon", values="intruders_low")
    assert (grid.diff().fillna(0) >= 0).all().all()
    assert (grid.diff(axis=1).fillna(0) >= 0).all().all()
    assert (grid.max(axis=1) <= grid.index).all()
    for k, epsilon in ((5, 0.3), (10, 0.5), (50, 0.9)):
        assert grid.loc[k, epsilon] == reference(base, tuned, k, epsilon)


def test_left_vectors_of_a_matrix_are_the_right_ones_of_its_transpose():
    generator = seeded(5)
    base, _, _ = with_values(values("power", 90), 96, 90, generator)
    tuned = spiked(base, [0.9, 0.5], generator)
    pairs = CheckpointPair(state([base]), state([tuned])), CheckpointPair(state([base.mT]), state([tuned.mT]))
    left = intruder_dimensions(pairs[0], side="left").tables["vectors"]["cosine_low"]
    right = intruder_dimensions(pairs[1], side="right").tables["vectors"]["cosine_low"]
    assert left.tolist() == pytest.approx(right.tolist(), abs=1e-9)


def test_a_spike_on_an_existing_output_direction_shows_from_the_right_only():
    generator = seeded(6)
    base, U, _ = with_values(values("geometric", 96), 96, 128, generator)
    tuned = base + 9 * U[:, :1] @ orthonormal(128, 1, generator).mT
    assert count(base, tuned, side="left") == 0
    assert count(base, tuned, side="right") == 1


def test_noise_on_a_decaying_spectrum_is_no_intruder():
    generator = seeded(7)
    base, _, _ = with_values(0.98 ** torch.arange(128), 128, 160, generator)
    noise = torch.randn(128, 160, generator=generator, dtype=torch.float64)
    tuned = base + 0.2 * noise / torch.linalg.matrix_norm(noise, 2)
    assert count(base, tuned) == 0


@pytest.mark.parametrize("rank", [1, 3])
def test_an_update_orthogonal_to_the_base_gives_at_most_its_rank(rank):
    generator = seeded(8)
    U, V = orthonormal(80, 20 + rank, generator), orthonormal(90, 20 + rank, generator)
    base = (U[:, :20] * values("geometric", 20)) @ V[:, :20].mT
    tuned = base + (U[:, 20:] * torch.linspace(2, 1.3, rank)) @ V[:, 20:].mT
    assert count(base, tuned) == rank


def test_rounding_to_bfloat16_is_no_intruder():
    base, _, _ = with_values(values("power", 96), 96, 128, seeded(9))
    base = base.float()
    assert cosines(base, base.bfloat16().float()).min() >= 0.9997
    assert count(base, base.bfloat16()) == 0


@given(seed=st.integers(0, 2**31), shape=st.sampled_from(((256, 256), (200, 330), (330, 200))))
@settings(max_examples=15)
def test_the_count_is_that_of_the_reference_definition(seed, shape):
    generator = seeded(seed)
    base, _, _ = with_values(values("power", min(shape)), *shape, generator)
    tuned = spiked(base, [1.1, 0.7, 0.5], generator).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiers, "SMALL", 0)
        assert count(base.float(), tuned) == reference(base.float(), tuned)


def test_a_run_of_ten_matrices_decides_one_again_and_says_so(monkeypatch):
    monkeypatch.setattr(tiers, "SMALL", 0)
    generator = seeded(10)
    base = [with_values(values("power", 128), 128, 160, generator)[0].float() for _ in range(10)]
    tuned = [spiked(W, [1.5], generator) for W in base[:9]] + [base[9]]
    result = intruder_dimensions(CheckpointPair(state(base), state(tuned)))
    assert result.metrics["verified"] == 1
    assert result.metrics["disagreements"] == 0
    assert result.metrics["intruders"] == 9
    assert any("1 of 9 changed matrices were decided again" in note for note in result.notes)


def test_a_wrong_decision_is_found_out_and_replaced(monkeypatch):
    """Break the certified path on purpose: the check must notice, and keep the exact answer."""
    from diagnostics.analyses.intruders import examine as intruders

    generator = seeded(11)
    base = [with_values(values("power", 128), 128, 160, generator)[0].float() for _ in range(10)]
    tuned = [spiked(W, [1.5], generator) for W in base]

    def wrong(base, tuned, k, *others):
        right = [decide_exactly(*pair, k) for pair in zip(base, tuned, strict=True)]
        return [
            tiers.Decision(
                **(
                    vars(decision)
                    | {"low": 0 * decision.low, "high": 0 * decision.low, "tier": ["direct"] * k}
                )
            )
            for decision in right
        ]

    monkeypatch.setattr(intruders, "decide_all", wrong)
    result = intruder_dimensions(CheckpointPair(state(base), state(tuned)), verify=1.0)
    assert result.metrics["disagreements"] == 10
    assert result.metrics["intruders"] == 10


def test_matrices_decided_side_by_side_are_decided_as_each_alone(monkeypatch):
    from diagnostics.analyses.intruders import analysis as intruders

    generator = seeded(19)
    shapes = [(128, 160)] * 3 + [(96, 160)] + [(128, 160)] * 2
    base = [with_values(values("power", min(shape)), *shape, generator)[0].float() for shape in shapes]
    tuned = [spiked(W, [1.5, 0.2 * i], generator) for i, W in enumerate(base)]
    tuned[1] = base[1].clone()
    pair = CheckpointPair(state(base), state(tuned))
    alone = intruder_dimensions(pair)
    names = list(pair.matrices)
    on_gpu = intruders.groups_of(pair, names, "cuda:0")
    assert sorted(map(len, on_gpu)) == [1, 5]
    monkeypatch.setattr(intruders, "groups_of", lambda *_: on_gpu)
    together = intruder_dimensions(pair)
    assert together.metrics == alone.metrics
    for table, column in (("matrices", "matrix"), ("matrices", "intruders"), ("vectors", "tier")):
        assert together.tables[table][column].tolist() == alone.tables[table][column].tolist()
    held = together.tables["vectors"]["cosine_low"] - alone.tables["vectors"]["cosine_high"]
    assert held.max() < 1e-6


def test_matrices_too_small_for_epsilon_or_k_are_not_counted_and_said():
    # floor(32) = sqrt(2 ln 32 / 32) = 0.465 > 0.8 · 0.5; floor(64) = 0.360 is below.
    generator = seeded(12)
    base = [torch.randn(32, 80, generator=generator), torch.randn(64, 80, generator=generator)]
    base.append(torch.randn(64, 6, generator=generator))
    tuned = [W + 9 * torch.randn_like(W[:, :1]) @ torch.randn_like(W[:1]) for W in base]
    result = intruder_dimensions(CheckpointPair(state(base), state(tuned)))
    table = result.tables["matrices"]
    assert table["status"].tolist() == ["not applicable", "measured", "not applicable"]
    assert table["intruders"].isna().tolist() == [True, False, True]
    assert result.metrics["not_applicable"] == 2
    assert result.metrics["matrices"] == 1
    assert "too small" in result.notes[0]
    assert not result.tables["vectors"].query("matrix.str.contains('layers.0.')")["intruder"].any()


def test_frozen_matrices_count_as_nothing_and_both_means_are_given():
    generator = seeded(13)
    base = [torch.randn(128, 128, generator=generator) for _ in range(4)]
    tuned = [spiked(base[0], [2.0], generator), *(W.clone() for W in base[1:])]
    metrics = intruder_dimensions(CheckpointPair(state(base), state(tuned))).metrics
    assert (metrics["matrices"], metrics["changed"], metrics["frozen"]) == (4, 1, 3)
    assert metrics["intruders_per_matrix"] == 0.25
    assert metrics["intruders_per_changed_matrix"] == 1
    assert metrics["rate"] == 0.1


def test_base_against_base_is_zero_everywhere():
    base = [torch.randn(96, 96, generator=seeded(i)) for i in range(3)]
    result = intruder_dimensions(CheckpointPair(state(base), state(base)))
    assert result.metrics["intruders"] == 0
    assert result.metrics["frozen"] == 3
    assert not len(result.tables["vectors"])
    assert list(result.figures()) == ["where"]


def test_another_training_run_is_not_taken_for_a_descendant():
    base, other = ([torch.randn(128, 128, generator=seeded(10 * i + j)) for j in range(4)] for i in range(2))
    result = intruder_dimensions(CheckpointPair(state(base), state(other)))
    assert result.metrics["descendant"] == 0
    assert "intruders" not in result.metrics
    assert "not a descendant" in result.notes[-1]


def test_a_small_model_full_of_intruders_is_still_a_descendant():
    # floor(128) = 0.275: twice that exceeds epsilon, so that the median rule alone would disown this one.
    generator = seeded(14)
    base = [with_values(values("flat", 128), 128, 128, generator)[0].float() for _ in range(3)]
    tuned = [spiked(W, [1.4] * 7, generator) for W in base]
    result = intruder_dimensions(CheckpointPair(state(base), state(tuned)))
    assert result.metrics["descendant"] == 1
    assert result.metrics["intruders"] > 15


def test_update_norm_effective_rank_and_critical_strength_are_those_of_the_delta(monkeypatch):
    generator = seeded(15)
    base, _, _ = with_values(values("power", 200), 200, 260, generator)
    spread = 0.01 * torch.randn(200, 260, generator=generator, dtype=torch.float64)
    S = torch.linalg.svdvals(spread.float().double())
    monkeypatch.setattr("diagnostics.analyses.intruders.delta_shape.SMALL", 0)  # take the estimate
    row = intruder_dimensions(CheckpointPair(state([base.float()]), state([(base + spread).float()])))
    row = row.tables["matrices"].iloc[0]
    assert row["update_norm"] == pytest.approx(spread.norm().item(), rel=1e-4)
    assert row["update_spectral_norm"] == pytest.approx(S[0].item(), rel=0.02)
    assert row["effective_rank"] == pytest.approx(linalg.effective_rank(S), rel=0.05)
    assert row["effective_rank_low"] < row["effective_rank"] < row["effective_rank_high"]
    expected = S[0].item() / linalg.critical_spike(torch.linalg.svdvals(base), 10, 200, 260)
    assert row["critical_ratio"] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("rank", [1, 5])
def test_the_effective_rank_of_a_low_rank_update_is_at_most_its_rank(rank, monkeypatch):
    generator = seeded(16)
    base = torch.randn(200, 260, generator=generator)
    B, A = torch.randn(200, rank, generator=generator), torch.randn(rank, 260, generator=generator)
    for small in (0, 640):
        monkeypatch.setattr("diagnostics.analyses.intruders.delta_shape.SMALL", small)
        result = intruder_dimensions(CheckpointPair(state([base]), state([base + B @ A])))
        assert (
            result.tables["matrices"]["effective_rank"][0] <= 1.05 * rank
        )  # rounding to float32 is noise of full rank


def test_workers_and_order_do_not_change_the_result(monkeypatch):
    monkeypatch.setattr(tiers, "SMALL", 0)
    generator = seeded(17)
    base = [with_values(values("power", 128), 128, 160, generator)[0].float() for _ in range(4)]
    tuned = [spiked(W, [0.8], generator) for W in base]
    alone = intruder_dimensions(CheckpointPair(state(base), state(tuned)))
    with joblib.parallel_config("threading", n_jobs=2):
        together = intruder_dimensions(CheckpointPair(state(base), state(tuned)))
    assert alone.tables["vectors"].equals(together.tables["vectors"])
    assert alone.metrics == together.metrics


def test_progress_is_told_of_every_matrix():
    base = [torch.randn(96, 96, generator=seeded(i)) for i in range(3)]
    heard = []
    intruder_dimensions(
        CheckpointPair(state(base), state([2 * W for W in base])), progress=lambda *at: heard.append(at)
    )
    assert [at[:2] for at in heard] == [(1, 3), (2, 3), (3, 3)]
    assert heard[0][2] == "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"k": 0}, "k is 0; it counts the leading singular vectors"),
        ({"k": 97}, "k is 97, but the largest matrix has only 96 singular vectors"),
        ({"epsilon": 0.0}, r"epsilon is 0.0; it is a cosine and lies in \(0, 1\]"),
        ({"epsilon": 1.5}, r"epsilon is 1.5; it is a cosine and lies in \(0, 1\]"),
        ({"verify": 2.0}, "verify is 2.0; it is a share"),
        ({"parts": ("head",)}, "no matrix in parts head; this pair has: block"),
    ],
)
def test_a_parameter_out_of_range_is_one_clear_error(parameters, message):
    W = torch.randn(96, 96, generator=seeded())
    with pytest.raises(ValueError, match=message):
        intruder_dimensions(CheckpointPair(state([W]), state([2 * W])), **parameters)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("up", "exact", "float32"), "side is 'up'; it is one of: left, right"),
        (("left", "fast", "float32"), "method is 'fast'; it is one of: certified, exact"),
        (("left", "exact", "bfloat16"), "dtype is 'bfloat16'; it is one of: float32, float64"),
    ],
)
def test_an_unknown_word_lists_the_known(words, message):
    # Below the analysis itself, whose annotations the tests' type checker would enforce first.
    with pytest.raises(ValueError, match=message):
        _check(10, 0.5, 0.0, *words)


def test_an_unknown_parameter_lists_the_known():
    W = torch.randn(96, 96, generator=seeded())
    with pytest.raises(LookupError, match="intruders has no parameter 'eps'; it has: k, epsilon, side"):
        intruder_dimensions(CheckpointPair(state([W]), state([W])), eps=0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(bad):
    W = torch.randn(96, 96, generator=seeded())
    tuned = 2 * W
    tuned[3, 5] = bad
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        intruder_dimensions(CheckpointPair(state([W]), state([tuned])))


@pytest.fixture
def adapted(tmp_path):
    """A Llama of width 96, an adapter with planted directions, and the merged model, each on disk."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    tuned = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_B" in name:
                value.mul_(2.0)
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path, tuned


def test_adapter_merged_model_and_itself_give_the_reference_counts_matrix_by_matrix(adapted):
    directory, tuned = adapted
    merged = tuned.merge_and_unload()
    merged.save_pretrained(directory / "full")
    pair = CheckpointPair(str(directory / "base"), str(directory / "full"))
    expected = {
        name: reference(*(W.float() for W in pair.read(name)))
        for name, matrix in pair.matrices.items()
        if matrix.part == "block"
    }
    assert sum(expected.values()) > 5
    for other in ("adapter", "full"):
        result = intruder_dimensions(CheckpointPair(str(directory / "base"), str(directory / other)))
        table = result.tables["matrices"].set_index("matrix")["intruders"]
        assert table.to_dict() == expected
    itself = intruder_dimensions(CheckpointPair(str(directory / "base"), str(directory / "base")))
    assert itself.metrics["intruders"] == 0


def test_counts_are_those_of_pefts_own_detector(adapted):
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    directory, tuned = adapted
    lines = []
    reduce_intruder_dimension(tuned, logging_sink=lines.append)
    theirs = {
        line.split(":")[0].removeprefix("base_model.model.") + ".weight": int(line.rsplit(": ", 1)[1])
        for line in lines
        if ": Intruders: " in line
    }
    result = intruder_dimensions(CheckpointPair(str(directory / "base"), str(directory / "adapter")))
    ours = result.tables["matrices"].set_index("matrix")["intruders"]
    assert theirs
    assert ours[ours > 0].to_dict() == theirs


def test_a_transposed_fused_checkpoint_gives_the_same_report_as_its_plain_twin():
    """GPT-2 keeps (in, out) and fuses q, k, v: the parts count as the separate matrices that they are."""
    generator = seeded(18)
    q, k, v = (with_values(values("power", 96), 96, 96, generator)[0].float() for _ in range(3))
    tuned = [spiked(W, sizes, generator) for W, sizes in ((q, [1.2]), (k, []), (v, [1.4, 1.1]))]
    fused = [{"h.0.attn.c_attn.weight": torch.cat(parts).mT.contiguous()} for parts in ((q, k, v), tuned)]
    table = intruder_dimensions(CheckpointPair(*fused)).tables["matrices"].set_index("matrix")
    name = "h.0.attn.c_attn.weight"
    assert table["intruders"].to_dict() == {
        f"{name}:{part}": reference(W, W1) for part, W, W1 in zip("qkv", (q, k, v), tuned, strict=True)
    }
    assert table["component"].tolist() == ["q_proj", "k_proj", "v_proj"]
    assert table.loc[f"{name}:k", "status"] == "frozen"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["certified", "exact"])
def test_a_gpu_decides_as_the_cpu_does(method):
    generator = seeded(20)
    shapes = [(128, 160)] * 3 + [(160, 128)] * 2
    base = [with_values(values("power", min(shape)), *shape, generator)[0].float() for shape in shapes]
    tuned = [spiked(W, [1.5, 0.2 * i], generator) for i, W in enumerate(base)]
    pair = CheckpointPair(state(base), state(tuned))
    on_cpu, on_gpu = (intruder_dimensions(pair, method=method, device=d) for d in ("cpu", "cuda"))
    for cpu, gpu in zip(
        on_cpu.tables["vectors"].itertuples(), on_gpu.tables["vectors"].itertuples(), strict=True
    ):
        assert cpu.intruder == gpu.intruder
        assert gpu.cosine_low <= cpu.cosine_high + 1e-5
        assert cpu.cosine_low <= gpu.cosine_high + 1e-5
