"""What is remembered of a base is what would have been computed, and whatever goes wrong costs time alone."""

import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diagnostics.analyses.intruders import decide as tiers
from diagnostics.analyses.intruders.analysis import intruder_dimensions
from diagnostics.edits.mitigate import mitigate
from diagnostics.execution.lockstep import run_in_lockstep
from diagnostics.numerics import linalg
from diagnostics.store import factor_cache
from diagnostics.store.factor_cache import FactorCache
from probes import CheckpointPair
from tests.diagnostics.shell import shell
from tests.diagnostics.spectra import orthonormal, values, with_values

ROOT = Path(__file__).parents[3]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def spiked(W, generator, size=1.3):
    u, v = (orthonormal(n, 1, generator).float() for n in W.shape)
    return W + size * torch.linalg.matrix_norm(W, 2) * u @ v.mT


def state(matrices):
    return {f"model.layers.{i}.self_attn.q_proj.weight": W for i, W in enumerate(matrices)}


@pytest.fixture
def low_bar(monkeypatch):
    """Decide small matrices in tiers too."""
    monkeypatch.setattr(tiers, "SMALL", 64)


@pytest.fixture
def triplets():
    """A base and two models tuned from it: matrices that take each tier, one transposed in memory."""
    generator = seeded(3)
    base = [
        with_values(values("power", 128), 128, 160, generator)[0].float(),
        with_values(values("power", 128), 160, 128, generator)[0].float(),
        with_values(values("small", 112), 112, 112, generator)[0].float(),
        with_values(values("power", 128), 160, 128, generator)[0].float().mT,
        torch.randn(40, 60, generator=generator),
    ]
    return base, *([spiked(W, generator) for W in base] for _ in range(2))


def same(first, second):
    """Whether two results are equal to the last bit."""
    assert first.metrics == second.metrics
    assert first.parameters == second.parameters
    assert first.notes == second.notes
    assert first.tables.keys() == second.tables.keys()
    return all(table.equals(second.tables[name]) for name, table in first.tables.items())


@pytest.mark.usefixtures("low_bar")
@pytest.mark.parametrize("given", [{}, {"method": "exact"}, {"side": "right"}, {"dtype": "float64"}])
def test_a_second_model_of_a_base_gets_the_same_bits_with_and_without_a_cache(triplets, tmp_path, given):
    base, *tuned = triplets
    for seed, model in enumerate(tuned):
        pair = CheckpointPair(state(base), state(model))
        plain, kept = (intruder_dimensions(pair, cache=where, **given) for where in (None, tmp_path))
        assert same(plain, kept), seed
    assert list(tmp_path.glob("*.safetensors"))


@pytest.mark.usefixtures("low_bar")
def test_what_was_made_of_a_base_is_not_made_again_for_another_model(triplets, tmp_path, monkeypatch):
    base, first, second = triplets
    intruder_dimensions(CheckpointPair(state(base), state(first)), cache=tmp_path)
    kept = set(tmp_path.glob("*.safetensors"))
    added = []
    put = FactorCache.put
    monkeypatch.setattr(FactorCache, "put", lambda *given: added.append(given[1]) or put(*given))
    intruder_dimensions(CheckpointPair(state(base), state(second)), cache=tmp_path)
    assert added == []
    assert set(tmp_path.glob("*.safetensors")) == kept
    # Of 5 bases: a Krylov space each but the last; both tall ones a factor, and the exact ones their vectors.
    assert len(kept) >= 4 + 2 + 1


def test_another_base_another_start_and_another_question_are_told_apart(tmp_path):
    W, calls = torch.randn(30, 40, generator=seeded()), []

    def asked(W, kind="a", parts=(1,)):
        cache = FactorCache.at(tmp_path)
        cache.of(W, W)(kind, parts, lambda: calls.append(kind) or {"made": W.sum(dim=0)})
        return len(calls)

    assert (asked(W), asked(W.clone())) == (1, 1)
    assert asked(W + 1) == 2
    assert asked(W, kind="b") == 3
    assert asked(W, parts=(torch.ones(2),)) == 4
    assert asked(W, parts=(torch.zeros(2),)) == 5
    # The same numbers, lying otherwise: a product with them may round otherwise.
    assert asked(W.mT.contiguous().mT) == 6
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert asked(W) == 7
    finally:
        torch.set_num_threads(threads)


def test_what_is_read_back_lies_in_memory_as_what_was_made(tmp_path):
    cache = FactorCache.at(tmp_path)
    tensors = {"row": torch.randn(3, 5), "column": torch.randn(5, 3).mT, "empty": torch.empty(0, 0)}
    cache.put("key", tensors)
    cached = cache.get("key")
    for name, tensor in tensors.items():
        assert torch.equal(cached[name], tensor)
        assert cached[name].stride() == tensor.stride()
        assert cached[name].data_ptr() % 64 == 0


@pytest.mark.parametrize("harm", ["cut", "flipped", "emptied", "another", "directory"])
def test_a_damaged_entry_is_computed_again_and_replaced(tmp_path, caplog, harm):
    W, cache = torch.randn(30, 40, generator=seeded()), FactorCache.at(tmp_path)
    factors = {"U": torch.arange(12.0).reshape(3, 4)}
    cache.of(W, W)("kind", (), lambda: factors)
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    if harm == "cut":
        path.write_bytes(content[:-7])
    elif harm == "flipped":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif harm == "emptied":
        path.write_bytes(b"")
    elif harm == "another":
        save_file({"U": torch.zeros(3, 4)}, path)
    else:
        path.unlink()
        path.mkdir()
    with caplog.at_level(logging.WARNING):
        recomputed = cache.of(W, W)("kind", (), lambda: factors)
    assert torch.equal(recomputed["U"], factors["U"])
    assert "damaged" in caplog.text
    if harm != "directory":
        assert torch.equal(load_file(path)["U"], factors["U"])


@pytest.mark.usefixtures("low_bar")
def test_a_cache_deleted_in_the_middle_changes_nothing(triplets, tmp_path):
    base, tuned, _ = triplets
    pair, where = CheckpointPair(state(base), state(tuned)), tmp_path / "cache"
    plain = intruder_dimensions(pair)
    kept = intruder_dimensions(
        pair, cache=where, progress=lambda *_: shutil.rmtree(where, ignore_errors=True)
    )
    assert same(plain, kept)


def entry(cache, key, kilobytes=100, used=None):
    """Put an entry of about this size, last used so many seconds ago."""
    import os

    cache.put(key, {"U": torch.zeros(kilobytes * 250)})
    if used is not None and (path := cache.directory / f"{key}.safetensors").exists():
        os.utime(path, (time.time() - used,) * 2)


def held(cache):
    return {path.stem for path in cache.directory.glob("*.safetensors")}


def size(cache):
    return sum(path.stat().st_size for path in cache.directory.glob("*.safetensors"))


def test_the_longest_unused_entries_of_earlier_runs_make_room(tmp_path):
    # 4 entries of 100,000 bytes and their headers fit, a fifth does not.
    cache = FactorCache.at(tmp_path, room=450_000)
    for age, key in enumerate("abcd"):
        entry(cache, key, used=1000 - age)
    cache.get("a")  # used now
    entry(cache, "e")
    assert held(cache) == {"a", "c", "d", "e"}
    assert size(cache) <= cache.room


def test_a_run_larger_than_the_cache_keeps_its_first_part_rather_than_its_last(tmp_path):
    cache = FactorCache.at(tmp_path, room=450_000)
    for _ in range(3):  # the same scan three times; whoever drops the oldest never finds anything
        for key in "abcdef":
            if cache.get(key) is None:
                entry(cache, key)
    assert held(cache) == set("abcd")
    assert not list(tmp_path.glob(".*.part"))


def test_an_entry_larger_than_the_cache_is_not_kept_and_costs_no_other(tmp_path):
    cache = FactorCache.at(tmp_path, room=450_000)
    entry(cache, "a", used=1000)
    entry(cache, "b", kilobytes=500)
    assert held(cache) == {"a"}


WRITER = """
import sys, torch
from diagnostics.store.factor_cache import FactorCache
cache = FactorCache.at(sys.argv[1], room=450_000)
for i in range(60):
    key = f"{i % 12}-{sys.argv[2] if i % 2 else ''}"
    found = cache.get(key)
    assert found is None or bool((found["U"] == i % 12).all())
    cache.put(key, {"U": torch.full((25_000,), float(i % 12))})
"""


def test_two_processes_share_a_cache_and_its_bound(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, name], cwd=ROOT) for name in "xy"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    cache = FactorCache(tmp_path, 450_000)
    assert 0 < size(cache) <= cache.room
    assert all(cache.get(key) is not None for key in held(cache))


def test_a_cache_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--cache .*file/here: cannot be written \(Not a directory\)"):
        FactorCache.at(tmp_path / "file" / "here")
    with pytest.raises(ValueError, match="a cache of 0 bytes holds nothing"):
        FactorCache.at(tmp_path, room=0)


def test_a_full_disk_costs_the_entry_alone(tmp_path, monkeypatch, caplog):
    def full(*given):
        raise OSError(28, "No space left on device")

    cache, W = FactorCache.at(tmp_path), torch.ones(2, 2)
    monkeypatch.setattr(factor_cache.os, "replace", full)
    result = cache.of(W, W)("kind", (), lambda: {"U": W})
    assert torch.equal(result["U"], W)
    assert "No space left" in caplog.text
    assert not [path for path in tmp_path.iterdir() if "safetensors" in path.name or "part" in path.name]


def test_whatever_copies_directories_may_leave_a_cache_out(tmp_path):
    FactorCache.at(tmp_path)
    # The signature of the cache directory tagging specification.
    tag = (tmp_path / "CACHEDIR.TAG").read_text()
    assert tag.startswith("Signature: 8a477f597d28d172789f06886806bc55\n")


def test_the_state_of_a_generator_after_a_remembered_factor_is_that_after_a_made_one(tmp_path):
    from diagnostics.analyses.intruders.inverse_factors import Tall

    W = with_values(values("power", 60), 90, 60, seeded(1))[0].float()
    drawn = []
    for _ in range(2):
        generator = seeded(5)
        (factor,) = run_in_lockstep([Tall.of(W, generator, FactorCache.at(tmp_path).of(W, W))])
        drawn.append((factor.smallest, factor.coordinate_error, torch.randn(3, generator=generator)))
        (recomputed,) = run_in_lockstep([Tall.of(W, seeded(5))])
        assert torch.equal(factor.L.tril(), recomputed.L.tril())
    assert drawn[0][:2] == drawn[1][:2]
    assert torch.equal(drawn[0][2], drawn[1][2])


def test_a_krylov_space_goes_on_from_what_is_remembered_as_from_what_was_made():
    W = torch.randn(1, 80, 90, generator=seeded(2))
    space = linalg.BlockKrylov(W, torch.randn(1, 80, 8, generator=seeded(3)))
    space.extend(3)
    resumed = linalg.BlockKrylov.resumed(W, 8, {name: t.clone() for name, t in space.state().items()})
    for krylov in (space, resumed):
        krylov.extend(2)
    assert torch.equal(space.basis, resumed.basis)
    assert torch.equal(space.products, resumed.products)


def test_mitigation_finds_in_the_cache_what_an_audit_left_there(triplets, tmp_path, monkeypatch):
    base, tuned, _ = triplets
    pair = state(base[:1]), state(tuned[:1])
    intruder_dimensions(CheckpointPair(*pair), cache=tmp_path / "cache")
    get, hits = FactorCache.get, []

    def counted(cache, key):
        entry = get(cache, key)
        hits.append(entry is not None)
        return entry

    monkeypatch.setattr(FactorCache, "get", counted)
    monkeypatch.setattr(FactorCache, "put", lambda *given: pytest.fail("computed again"))
    mitigate(*pair, tmp_path / "out", cache=tmp_path / "cache")
    assert hits  # it asked the cache,
    assert all(hits)  # which had the answer


def test_the_command_keeps_a_cache_where_it_or_the_environment_says_and_nowhere_else(
    checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "diagnostics.analyses.intruders.examine.LARGEST_FLOOR", 2
    )  # else 8x8 is not applicable
    for name in ("TUNESCOPE_CACHE", "TUNESCOPE_CACHE_GB"):
        monkeypatch.delenv(name, raising=False)
    given = (
        "audit",
        *checkpoints,
        "--only",
        "intruders",
        "--set",
        "intruders.k=3",
        "--device",
        "cpu",
        "--quiet",
    )
    codes, outcomes = [], []
    for number, more in enumerate([(), ("--cache", tmp_path / "a", "--cache-gb", "0.001"), ()]):
        if number == 2:
            monkeypatch.setenv("TUNESCOPE_CACHE", str(tmp_path / "b"))
        codes.append(shell(monkeypatch, *given, "--out", tmp_path / f"{number}", *more))
        outcomes.append(
            json.loads((tmp_path / f"{number}" / "audit.json").read_text())["analyses"]["intruders"]
        )
    # Four matrices, each decomposed.
    assert [len(list((tmp_path / name).glob("*.safetensors"))) for name in "ab"] == [4, 4]
    assert codes[0] == codes[1] == codes[2]
    assert all(outcome["metrics"] == outcomes[0]["metrics"] for outcome in outcomes)
    assert all(outcome["parameters"] == outcomes[0]["parameters"] for outcome in outcomes)
    assert "cache" not in outcomes[1]["parameters"]
    assert outcomes[0]["metrics"]["matrices"] == 4
