"""The right way round: what the files of a pair say of each other."""

import json
import shutil

import pytest

from diagnostics.analyses.integrity.direction import evidence, names
from diagnostics.audit.demo import BUNDLED
from probes import CheckpointPair, open_checkpoint


@pytest.fixture
def pair(tmp_path):
    """`pair(base={...}, tuned={...})`: a pair in `org/base` and `org/tuned` with these files written."""

    def written(**files):
        for role, source in (("base", "base"), ("tuned", "full")):
            folder = tmp_path / "org" / role
            shutil.copytree(BUNDLED / source, folder)
            for name, content in files.get(role, {}).items():
                if name == "config.json":
                    content = json.dumps({**json.loads((folder / name).read_text()), **content})
                (folder / name).write_text(content)
        return CheckpointPair(tmp_path / "org" / "base", tmp_path / "org" / "tuned")

    return written


def said(pair, adapter=None):
    return [(fact.says, fact.weight) for fact in evidence(pair, adapter)]


def test_files_that_say_nothing_are_no_evidence(pair):
    assert said(pair()) == []


def test_a_tuned_config_that_names_base_is_right(pair):
    assert said(pair(tuned={"config.json": {"_name_or_path": "org/base"}})) == [("right", "strong")]


def test_a_base_config_that_names_tuned_is_swapped(pair):
    assert said(pair(base={"config.json": {"_name_or_path": "org/tuned"}})) == [("swapped", "strong")]


@pytest.mark.parametrize("line", ["base_model: org/tuned", "base_model:\n- org/tuned"])
def test_a_model_card_of_base_that_names_tuned_is_swapped(pair, line):
    card = f"---\nlicense: mit\n{line}\n---\n# A model\n"
    assert said(pair(base={"README.md": card})) == [("swapped", "strong")]


def test_a_name_is_compared_as_a_whole(pair):
    assert said(pair(base={"config.json": {"_name_or_path": "other/tuned"}})) == []
    assert said_name("base") is False
    assert said_name("audit/base") is False


def said_name(name):
    return names(name, open_checkpoint(BUNDLED / "base"))


def test_a_trainers_state_is_weak(pair):
    states = {role: {"trainer_state.json": json.dumps({"global_step": n})} for role, n in RUN.items()}
    assert said(pair(**states)) == [("swapped", "weak")]


RUN = {"base": 300, "tuned": 100}


def test_an_adapter_in_the_place_of_base_is_swapped():
    adapter = open_checkpoint(BUNDLED / "lora-r8", base=BUNDLED / "base")
    swapped = CheckpointPair(adapter, BUNDLED / "base")
    assert ("swapped", "strong") in said(swapped)
