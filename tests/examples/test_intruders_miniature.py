"""The miniature of intruder dimensions: its parts, its claims, and, slowly, that they hold."""

from dataclasses import replace

import intruders_miniature as miniature
import pytest
import torch
from miniature import SYMBOLS, Decoder, Source, Text


@pytest.fixture
def source() -> Source:
    return Source.drawn(torch.Generator().manual_seed(0))


class Oracle(torch.nn.Module):
    """A model that knows the source."""

    def __init__(self, source: Source):
        super().__init__()
        self.source = source

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*symbols.shape, SYMBOLS)
        logits[:, 1:] = self.source.logits[symbols[:, :-1], symbols[:, 1:]]
        return logits


def test_no_model_does_better_than_the_source_itself(source: Source):
    text = Text.of(source, 16, torch.Generator().manual_seed(1))
    assert text.loss(Oracle(source)) == pytest.approx(text.entropy, rel=1e-6)
    assert text.loss(Oracle(source.mixed(source, 0.5))) == pytest.approx(text.entropy, rel=1e-6)
    torch.manual_seed(0)
    assert text.loss(Decoder()) > text.entropy


def test_samples_follow_the_source():
    # Every symbol is followed by the next one, but for a chance of 31 e^-30.
    logits = torch.zeros(SYMBOLS, SYMBOLS, SYMBOLS)
    last = torch.arange(SYMBOLS)
    logits[:, last, (last + 1) % SYMBOLS] = 30.0
    symbols = Source(logits).sample(8, torch.Generator().manual_seed(0))
    assert torch.equal(symbols[:, 2:], (symbols[:, 1:-1] + 1) % SYMBOLS)


def test_the_reference_finds_one_planted_direction():
    # The base lacks its last output direction; the update adds it, larger than all others.
    base = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]))[:, :4]
    planted = base.clone()
    planted[4, 3] = 10.0
    # Leading tuned vector: column 3, (0, 0, 0, 1, 10); its cosine with the base's fourth is 1 / sqrt(101).
    assert miniature.reference_cosines(base, planted).tolist() == pytest.approx([101**-0.5, 1, 1, 1])


@pytest.fixture(scope="module")
def edited_pair() -> tuple[Decoder, Decoder]:
    """A decoder, and one with a direction added to one matrix, far larger than all others."""
    torch.manual_seed(0)
    base = Decoder()
    model = Decoder()
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        spike = torch.outer(torch.randn(128), torch.randn(128))
        model.layers[0].o_proj.weight += 10 * spike / spike.norm()
    return base, model


@pytest.mark.parametrize(("mode", "norm"), [("top", 7), ("all", 7), ("update", 7), ("neighbour", 10)])
def test_an_edit_touches_only_what_its_mode_says(edited_pair, mode: str, norm: float):
    # The base's own singular values are near 1: only scaling the spike of 10 moves the delta's norm, to 7.
    base, model = edited_pair
    edited = miniature.edited(base, model, mode)
    for name, weight in edited.named_parameters():
        changed = not torch.equal(weight, model.get_parameter(name))
        assert changed == (name == "layers.0.o_proj.weight"), name
    delta = edited.layers[0].o_proj.weight - base.layers[0].o_proj.weight
    assert delta.norm().item() == pytest.approx(norm, abs=0.5)
    assert torch.equal(model.layers[1].o_proj.weight, base.layers[1].o_proj.weight)


def outcome(recipe: int, counts: list[int], **changes: object) -> miniature.Outcome:
    default = miniature.Outcome(
        seed=0,
        recipe=miniature.RECIPES[recipe],
        counts=counts,
        first_task=[2.0] * len(counts),
        forgetting=0.5,
        update_norm=1.0,
        effective_rank=1.0,
        edits={"top": (-0.2, 0.04), "all": (-0.2, 0.04), "neighbour": (0.0, 0.01), "update": (-0.2, 0.04)},
    )
    return replace(default, **changes)


def test_the_claims_hold_of_outcomes_that_keep_them_and_fail_one_by_one():
    full, r1, r4 = outcome(0, [3, 7, 11]), outcome(1, [12, 24, 35]), outcome(2, [37, 59, 74])
    assert all(claim.holds for claim in miniature.claims(full, r1, r4))

    def broken(full=full, r1=r1, r4=r4) -> list[str]:
        return [claim.text for claim in miniature.claims(full, r1, r4) if not claim.holds]

    assert "3 times" in broken(r4=replace(r4, counts=[8, 59, 74]))[0]
    assert "r=1 has more" in broken(r1=replace(r1, counts=[3, 24, 35]))[0]
    assert "lowers the loss" in broken(r1=replace(r1, edits=r1.edits | {"top": (-0.2, 0.06)}))[0]
    assert "neighbours" in broken(r1=replace(r1, edits=r1.edits | {"neighbour": (-0.02, 0.0)}))[0]
    assert "grow" in broken(r4=replace(r4, counts=[37, 36, 74]))[0]
    assert "after the last task" in broken(r4=replace(r4, counts=[37, 38, 32]), r1=r1)[-1]


def test_a_sequence_that_ends_early_is_not_compared_at_its_end():
    full, r1, r4 = outcome(0, [3, 7, 11]), outcome(1, [12]), outcome(2, [37, 59, 74])
    assert all(claim.holds for claim in miniature.claims(full, r1, r4))


@pytest.mark.slow
def test_a_quick_run_counts_as_the_definition_does_and_prints_every_figure(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["intruders_miniature.py", "--seeds", "0", "--quick"])
    monkeypatch.setenv("COLUMNS", "200")  # or cells break into lines, words from their neighbours
    assert miniature.main() == 0  # every count was held against the reference on the way
    printed = capsys.readouterr().out
    for words in ("LoRA r=4", "the original base", "neighbour", "RoBERTa", "effective rank"):
        assert words in printed


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_must_hold_holds_on_three_seeds(seed: int):
    for claim in miniature.claims(*miniature.measure(seed, miniature.Budget())):
        assert claim.holds, f"{claim.text}: {claim.numbers}"
