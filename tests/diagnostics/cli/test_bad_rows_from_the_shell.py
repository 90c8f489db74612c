"""Every kind of bad rows, as a person meets it: one line that says what, where and how to mend it."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import diagnostics
from diagnostics.store.audit_store import load
from tests.diagnostics.chains import save_tokenizer
from tests.diagnostics.shell import shell

BUNDLED = Path(diagnostics.__file__).parent / "bundled"
BASE, TUNED = BUNDLED / "base", BUNDLED / "full"
ROWS = {
    "task": BUNDLED / "task.jsonl",
    "keep": BUNDLED / "keep.jsonl",
    "code": BUNDLED / "ood-code.jsonl",
    "words": BUNDLED / "ood-words.jsonl",
}


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Run the command; its exit code, the lines on standard output and, but for bars, on standard error."""

    def run(*arguments):
        capsys.readouterr()
        code = shell(monkeypatch, *arguments)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out.splitlines(), [line for line in err.splitlines() if "━" not in line]

    return run


@pytest.fixture
def audit(run_command, tmp_path):
    """Audit the bundled models with `--only ood` and these files in place of the bundled ones."""

    def run(*more, base=BASE, tuned=TUNED, **files):
        rows = {**ROWS, **files}
        return run_command(
            "audit", base, tuned, "--task", rows["task"], "--keep", rows["keep"], "--ood",
            f"a={rows['code']}", "--ood", f"b={rows['words']}", "--limit", 12, "--set", "ood.draws=2",
            "--verbose",
            "--device", "cpu", "--out", tmp_path / "audit", "--only", "ood", *more,
        )  # fmt: skip

    return run


@pytest.fixture
def detect(run_command):
    """Score rows by the bundled models."""

    def run(rows=ROWS["code"], *more, base=BASE, tuned=TUNED, task=ROWS["keep"]):
        return run_command(
            "detect", rows, "--base", base, "--tuned", tuned, "--task", task, "--device", "cpu", *more
        )  # fmt: skip

    return run


def written(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def one_line(outcome, message):
    """What was refused: exit code 2, nothing on standard output, and one line that says why."""
    code, out, err = outcome
    assert (code, out, len(err)) == (2, [], 1), outcome
    assert re.search(message, err[0]), err[0]


# --- what is wrong with a file ---

FILES = {
    "empty": ([], r'rows\.jsonl: holds no rows; a row has fields, such as "text"$'),
    "not JSON": (
        [{"text": "a"}, '{"text": "b"'],
        r"rows\.jsonl:2: not JSON: Expecting ',' delimiter.*; each line is one object$",
    ),
    "a field is missing": (
        [{"text": "a"}, {"txt": "b"}],
        r'rows\.jsonl:2: the row lacks "text"; this one has "txt"$',
    ),
    "no field is known": (
        [{"content": "a"}],
        r'rows\.jsonl:1: a row is one of \{"text"\}, \{"prompt", "completion"\}, .*; this one has "content"$',
    ),
    "a field is mistyped": (
        [{"text": "a"}, {"text": 3}],
        r'rows\.jsonl:2: "text" is a whole number \(3\); it is a string$',
    ),
    "the answer is outside": (
        [{"prompt": "a", "choices": ["b", "c"], "answer": 2}],
        r'rows\.jsonl:1: "answer" is 2 but there are 2 choices; it counts from 0$',
    ),
    "the answer is a text": (
        [{"prompt": "a", "choices": ["b", "c"], "answer": "b"}],
        r'rows\.jsonl:1: "answer" is a string \("b"\); it is the number of the right choice, from 0$',
    ),
}


@pytest.mark.parametrize("which", FILES)
def test_a_bad_file_is_refused_by_line_and_field_before_anything_runs(which, audit, detect, tmp_path):
    rows, message = FILES[which]
    file = written(tmp_path / "rows.jsonl", *rows)
    for role in ("task", "keep", "code"):
        one_line(audit(**{role: file}), message)
    assert not (tmp_path / "audit").exists()
    one_line(detect(file), message)
    one_line(detect(task=file), message)


def test_a_file_that_is_not_there_is_named_with_its_option(audit, detect, tmp_path):
    nowhere = tmp_path / "nowhere.jsonl"
    message = (
        r"nowhere\.jsonl: there is no such file; a task is a \.jsonl or \.csv file, or hub-dataset:split$"
    )
    one_line(audit(task=nowhere), f"--task .*{message}")
    one_line(audit(words=nowhere), f"--ood .*{message}")
    one_line(detect(nowhere), message)


def test_one_set_of_rows_is_not_both_in_and_out_of_distribution(audit, tmp_path):
    copy = tmp_path / "copy.jsonl"
    shutil.copy(ROWS["task"], copy)
    one_line(
        audit(code=copy),
        r"--task .*task\.jsonl and --ood a=.*copy\.jsonl hold the same rows; rows in distribution cannot "
        "be out of it: give another file for one of them$",
    )


# --- what is wrong with a set ---


def test_fewer_than_two_rows_are_refused(audit, detect, tmp_path):
    file = written(tmp_path / "one.jsonl", {"text": "a text"})
    for role in ("task", "keep", "code"):
        code, _, err = audit(**{role: file})
        assert code == 2
        assert len(err) == 1
        assert re.search(
            r"ood: .*one\.jsonl: has 1 row, and OOD detection needs at least 2; give it more$", err[0]
        )
    one_line(
        detect(task=file),
        r"one\.jsonl: has 1 row, and calibrating a detector needs at least 2; give it more$",
    )


def test_fewer_than_two_rows_with_something_to_score_are_refused(audit, detect, tmp_path):
    file = written(tmp_path / "hollow.jsonl", {"text": "a text"}, {"text": ""}, {"text": ""})
    code, _, err = audit(task=file)
    assert code == 2
    assert err == [
        "tunescope: ood: --task: 1 of 3 rows have a token to score, and OOD detection needs at least 2; a "
        "text of one token is scored only behind a BOS"
    ]
    code, out, err = detect(task=file)
    assert (code, out) == (2, [])
    assert re.search(
        r"hollow\.jsonl: 1 of 3 rows have a token to score, and calibrating a detector needs at least 2",
        err[-1],
    )


def test_rows_longer_than_the_context_are_counted_shown_and_read_whole_when_asked_for(
    audit, detect, tmp_path
):
    long = {"text": "Return the value of the named attribute of an object. " * 60}
    file = written(tmp_path / "long.jsonl", long, *ROWS["code"].read_text().splitlines()[:5])
    code, out, err = audit(code=file)
    assert (code in (0, 1), err) == (True, []), err
    messages = (
        r"long\.jsonl: 1 of 6 rows longer than the longest sequence and cut, the first at .*long\.jsonl:1",
        r"1 of 42 rows were cut; --set ood\.windows=true scores them to the end",
    )
    report = (tmp_path / "audit" / "report.html").read_text()
    for message in messages:
        assert re.search(message, "\n".join(out))
        assert re.search(message, report)
    truncated = load(tmp_path / "audit").results["ood"]
    assert truncated.metrics["truncated"] == 1
    assert truncated.tables["sets"].set_index("set")["truncated"]["a"] == pytest.approx(1 / 6)

    code, out, err = audit("--set", "ood.windows=true", code=file)
    windowed = load(tmp_path / "audit").results["ood"]
    assert windowed.metrics["truncated"] == 0
    assert re.search(r"long\.jsonl: 1 of 6 rows have more than 256 tokens and were read in windows", str(out))
    tokens = [result.tables["rows"].query("set == 'a'")["tokens"].iloc[0] for result in (truncated, windowed)]
    assert tokens[0] == 255 < tokens[1]

    code, out, err = detect(file)
    assert [json.loads(line)["truncated"] for line in out] == [True, *[False] * 5]
    assert json.loads(out[0])["tokens"] == 255


# --- what is wrong with models ---


@pytest.fixture
def changed(tmp_path):
    """A copy of the bundled fine-tune, for what is to be wrong with it."""
    return Path(shutil.copytree(TUNED, tmp_path / "changed"))


def edit(path, change):
    """Change a JSON file."""
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_tokenizers_that_differ_are_said_once_and_each_side_reads_with_its_own(audit, detect, changed):
    for file in BASE.glob("tokenizer*"):
        shutil.copy(file, changed)

    def swap(record):
        vocabulary = record["model"]["vocab"]
        first, second = "Ġa", "Ġthe"
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    edit(changed / "tokenizer.json", swap)
    code, out, err = audit(tuned=changed)
    assert (code in (0, 1), err) == (True, [])
    note = r"note: ood: base and tuned split \d+ of \d+ rows differently, .* reads with its own tokenizer"
    assert sum(bool(re.search(note, line)) for line in out) == 1
    code, _, err = audit("--only", "drift", tuned=changed)
    assert (code, len(err)) == (2, 1)
    assert re.search(
        r"drift: base and tuned split \d+ of \d+ rows differently, .* not of the same tokens$", err[0]
    )


def test_a_bos_that_tuned_does_not_add_is_said(audit, changed):
    for file in BASE.glob("tokenizer*"):
        shutil.copy(file, changed)
    edit(changed / "tokenizer.json", lambda record: record.update(post_processor=None))
    code, out, err = audit(tuned=changed)
    assert (code in (0, 1), err) == (True, [])
    note = (
        r"note: ood: only base scores the first token of each text, because the tokenizer of tuned puts no "
        r"token in front of it; if that is a mistake, save the tokenizer of base with tuned$"
    )
    assert sum(bool(re.search(note, line)) for line in out) == 1


@pytest.fixture
def broken(changed):
    """The fine-tune with a weight of layer 2 that is infinite."""
    from safetensors.torch import load_file, save_file

    (file,) = changed.glob("*.safetensors")
    weights = load_file(file)
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = math.inf
    save_file(weights, file, metadata={"format": "pt"})
    return changed


def test_logits_that_are_not_finite_are_refused_by_row_and_layer(audit, detect, broken):
    message = (
        r"\.jsonl:\d+ \(tuned\): its logits are NaN or infinite \(first at layer 2\); half precision "
        r"overflows at times: run it in float32 \(--dtype float32\)$"
    )
    code, _, err = audit(tuned=broken)
    assert code == 2, err
    integrity, ood = sorted(err)
    assert re.search(r"integrity: tuned .*model\.layers\.2\.mlp\.down_proj\.weight", integrity)
    assert re.search(message, ood)
    one_line(detect(tuned=broken), message)


def test_drift_and_mitigation_refuse_what_is_not_finite_too(run_command, broken, tmp_path):
    rows = ("--task", ROWS["keep"], "--keep", ROWS["words"], "--limit", 8, "--device", "cpu")
    code, _, err = run_command(
        "audit", BASE, broken, *rows, "--only", "drift,mitigation", "--out", tmp_path / "audit"
    )  # fmt: skip
    assert code == 2, err
    drift, integrity, mitigation = sorted(err)
    assert "model.layers.2.mlp.down_proj.weight" in integrity
    assert re.search(r"drift: .*\.jsonl:\d+ \(tuned\): the residuals at layer 2 are NaN or infinite", drift)
    assert re.search(r"mitigation: .*(NaN|finite)", mitigation)


def test_labels_that_the_models_head_does_not_know_are_refused(run_command, tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    places = []
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name, "abcdef")
        places.append(tmp_path / name)
    task = written(tmp_path / "task.jsonl", {"text": "ab", "label": "yes"}, {"text": "ba", "label": "maybe"})
    keep = written(tmp_path / "keep.jsonl", {"text": "ab", "label": 0}, {"text": "ba", "label": 1})
    code, _, err = run_command(
        "audit", *places, "--task", task, "--keep", keep, "--only", "mitigation", "--device", "cpu",
        "--out", tmp_path / "audit",
    )  # fmt: skip
    assert (code, len(err)) == (2, 1), err
    assert re.search(
        r"mitigation: .*task\.jsonl:2: \"label\" is 'maybe', which the model does not know; its 2 labels are "
        r"'no', 'yes'; give one of them, or its number from 0$",
        err[0],
    )


# Files that make transformers raise a TypeError, an AttributeError, a ZeroDivisionError, a bare Exception…
MALFORMED = {
    "tokenizer.json is a list": ("tokenizer.json", "[]", "its tokenizer cannot be read"),
    "tokenizer.json is a number": ("tokenizer.json", "3", "its tokenizer cannot be read"),
    "tokenizer_config.json is a list": ("tokenizer_config.json", "[]", "its tokenizer cannot be read"),
    "generation_config.json is a list": ("generation_config.json", "[]", "does not load as a model"),
    "a size is a text": ("config.json", {"hidden_size": "big"}, "its config.json is none of a llama model"),
    "no attention head": ("config.json", {"num_attention_heads": 0}, "its config.json is none of a llama"),
    "7 heads of 128": ("config.json", {"num_attention_heads": 7}, "its config.json is none of a llama model"),
}


@pytest.mark.parametrize("which", MALFORMED)
def test_a_malformed_file_of_a_checkpoint_is_wrong_input_and_no_crash(which, run_command, changed, tmp_path):
    name, content, message = MALFORMED[which]
    if isinstance(content, dict):
        edit(changed / name, lambda record: record.update(content))
    else:
        (changed / name).write_text(content)
    arguments = ("audit", BASE, changed, "--task", ROWS["task"], "--limit", 4, "--only", "drift")
    code, _, err = run_command(*arguments, "--device", "cpu", "--out", tmp_path / "audit")
    assert (code, len(err)) == (2, 1), err
    assert f"drift: {changed}: {message}" in err[0]
    assert not (tmp_path / "audit" / "audit.log").exists()
