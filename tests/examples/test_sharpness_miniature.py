"""The miniature of layer-wise sharpness: its chains, its plants, and, slowly, that its claims hold."""

from pathlib import Path

import pytest
import sharpness_miniature as miniature
import torch

from diagnostics.numerics.rank_correlation import LEAST


@pytest.fixture(scope="module")
def model() -> object:
    torch.manual_seed(0)
    return miniature.make_model().eval()


@pytest.mark.parametrize("name", [*miniature.MAIN, "values 1 of block 5", "values 3 of block 2"])
def test_a_plant_changes_weights_of_its_block_alone_and_no_function(model, name):
    planted = miniature.planted(model, name)
    ids = torch.arange(miniature.CONTEXT)[None] % miniature.SYMBOLS
    with torch.no_grad():
        expected, actual = model(ids).logits, planted(ids).logits
    if "neurons" in name:
        assert torch.allclose(expected, actual, atol=1e-5)
    else:
        assert torch.equal(expected, actual)
    changed = {
        key.split(".")[2]
        for key, value in planted.state_dict().items()
        if not torch.equal(value, model.state_dict()[key])
    }
    assert changed == (set() if name == "plain" else {name.rpartition(" ")[2]})


def test_a_plant_of_heads_turns_so_many_heads():
    torch.manual_seed(1)
    model = miniature.make_model()
    planted = miniature.planted(model, "values 3 of block 2")
    before, after = (network.model.layers[2].self_attn.v_proj.weight for network in (model, planted))
    assert int((before != after).any(dim=1).sum()) == 3 * miniature.WIDTH // miniature.HEADS


def test_half_of_the_rows_of_a_task_are_drawn_anew_and_rows_are_chances():
    generator = torch.Generator().manual_seed(0)
    chains = miniature.Chains.drawn(6, generator)
    task = chains.redrawn((0, 1), generator)
    same = (task.tables == chains.tables[:2]).all(dim=-1)
    assert same.sum(dim=1).tolist() == [miniature.SYMBOLS // 2] * 2
    assert torch.allclose(task.tables.sum(-1), torch.ones(2, miniature.SYMBOLS))
    texts = task.texts(5, generator)
    assert {len(text) for text in texts} == {miniature.CONTEXT}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_must_hold_holds(seed: int, tmp_path: Path, capsys):
    budget = miniature.Budget(natural=0 if seed else LEAST)
    measured = miniature.measure(budget, seed, tmp_path)
    miniature.show(measured, miniature.Console(width=150))
    assert "reported  plants" in capsys.readouterr().out
    for claim in miniature.claims(measured):
        assert claim.holds, f"{claim.text}: {claim.numbers}"
