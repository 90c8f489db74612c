"""What changed outside the weights: each difference of the files, judged, with base's value next to tuned's.

Rules (ours): what changes the meaning of an id, a text or a class that base knew is a warning; what is added,
or only describes, is information.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diagnostics.analyses.integrity.model_files import ModelFiles, mapping
from probes import CheckpointPair
from probes.models.config_changes import config_changes

Judged = Literal["info", "warn", "fail"]

SHOWN = 5  # items of a list in a cell
WIDTH = 160  # characters of a cell
NONE = "none"

# The parts of tokenizer.json through which a text goes; two equal vocabularies may still split otherwise.
PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# Fields of config.json that are judged elsewhere: by their tokens, by name and order, by the weights.
ELSEWHERE = ("eos_token_id", "bos_token_id", "pad_token_id", "id2label", "label2id", "dtype", "architectures")
SILENT = ("_name_or_path", "transformers_version")
MEANINGS = {
    "vocab_size": "rows of the embedding",
    "max_position_embeddings": "longest context that the model is built for",
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One difference.

    Attributes:
        kind: names the metric that counts it; several differences may be of one kind.
    """

    where: str
    what: str
    base: str
    tuned: str
    judged: Judged
    meaning: str
    kind: str = ""


def changes(pair: CheckpointPair, base: ModelFiles, tuned: ModelFiles) -> list[Change]:
    """Every difference outside the weights, the most severe first."""
    differences = [
        *_config(pair), *_lengths(base, tuned), *_labels(base, tuned), *_tokenizer(base, tuned),
        *_template(base, tuned), *_generation(base, tuned), *_stops(base, tuned), *_damaged(base, tuned),
    ]  # fmt: skip
    return sorted(differences, key=lambda change: ("fail", "warn", "info").index(change.judged))


def template_diff(base: ModelFiles, tuned: ModelFiles) -> list[str]:
    """The lines of a unified diff of the chat templates; none where they are equal."""
    ours, theirs = ((side.template or "").splitlines() for side in (base, tuned))
    return list(difflib.unified_diff(ours, theirs, "base", "tuned", lineterm=""))


def _config(pair: CheckpointPair) -> Iterator[Change]:
    """Fields of config.json, as transformers understands them."""
    dtypes = pair.base.dtype, pair.tuned.dtype
    if dtypes[0] != dtypes[1]:
        meaning = "the dtype that most weights are stored in"
        yield Change(
            where="weights", what="dtype", base=dtypes[0], tuned=dtypes[1], judged="info", meaning=meaning
        )
    classes = pair.base.architecture, pair.tuned.architecture
    if classes[0] != classes[1]:
        yield Change(
            where="config", what="architectures", base=classes[0], tuned=classes[1], judged="info",
            meaning="the class of the model: another head, or none",
        )  # fmt: skip
    for change in config_changes(pair.base, pair.tuned):
        name = change.field.rpartition(".")[2]
        if name in ELSEWHERE or name in SILENT:
            continue
        judged: Judged = "warn" if change.changes_function else "info"
        kind = "function_changes" if change.changes_function else ""
        meaning = MEANINGS.get(name, "describes the model; its function stays")
        if change.changes_function:
            meaning = "changes what equal weights compute; each side runs under its own"
        elif name == "tie_word_embeddings":
            meaning = "whether the head is the embedding; the weights of both sides allow it"
        elif name == "max_position_embeddings" and _less(change.tuned, change.base):
            judged, kind, meaning = "warn", "shortened", f"{meaning}; tuned has less than base"
        yield Change(
            where="config", what=change.field, base=cell(change.base), tuned=cell(change.tuned),
            judged=judged, meaning=meaning, kind=kind,
        )  # fmt: skip


def _less(first: Any, second: Any) -> bool:
    return isinstance(first, int) and isinstance(second, int) and first < second


def _lengths(base: ModelFiles, tuned: ModelFiles) -> Iterator[Change]:
    """Where the tokenizer cuts texts."""
    lengths = base.context, tuned.context
    if lengths[0] != lengths[1] and tuned.tokenizer_config and base.tokenizer_config:
        yield Change(
            where="tokenizer", what="model_max_length", base=cell(lengths[0]), tuned=cell(lengths[1]),
            judged="info", meaning="where the tokenizer cuts texts",
        )  # fmt: skip


def _labels(base: ModelFiles, tuned: ModelFiles) -> Iterator[Change]:
    """Names and order of the classes."""
    names = [_label_names(side) for side in (base, tuned)]
    if names[0] == names[1] or not names[1]:
        return
    same = sorted(names[0]) == sorted(names[1])
    yield Change(
        where="labels", what="id2label", base=cell(names[0]), tuned=cell(names[1]),
        judged="warn" if same else "info", kind="reordered_labels" if same else "",
        meaning="the same classes in another order: an index means another class" if same
        else "tuned has classes of its own",
    )  # fmt: skip


def _label_names(side: ModelFiles) -> list[str]:
    labels = mapping(side.config.get("id2label"))
    return [str(labels[key]) for key in sorted(labels, key=lambda key: (len(str(key)), str(key)))]


def _tokenizer(base: ModelFiles, tuned: ModelFiles) -> Iterator[Change]:
    """Vocabulary, splitting and special tokens."""
    if not base.tokenizer or not tuned.tokenizer:
        slow = base.slow_files(), tuned.slow_files()
        for name in sorted(set(slow[0]) & set(slow[1])):
            if slow[0][name] != slow[1][name]:
                sizes = [f"{len(side[name]):,} bytes" for side in slow]
                yield Change(
                    where="tokenizer", what=name, base=sizes[0], tuned=sizes[1], judged="warn",
                    kind="tokenizer_changes", meaning="the files differ: texts may be split otherwise",
                )  # fmt: skip
    else:
        yield from _vocabulary(base.vocabulary, tuned.vocabulary)
        yield from _pipeline(base.tokenizer, tuned.tokenizer)
    roles = dict.fromkeys([*base.special, *tuned.special])
    for role in roles if base.tokenizer_config and tuned.tokenizer_config else ():
        texts = base.special.get(role), tuned.special.get(role)
        if texts[0] != texts[1]:
            lost = texts[0] is not None
            yield Change(
                where="tokenizer", what=role, base=cell(texts[0]), tuned=cell(texts[1]), judged="info",
                meaning=f"the tokenizer's {role.replace('_', ' ')}" + ("" if lost else ", which base lacks"),
            )  # fmt: skip


def _vocabulary(base: Mapping[str, int], tuned: Mapping[str, int]) -> Iterator[Change]:
    moved = [token for token, index in base.items() if token in tuned and tuned[token] != index]
    gone = [token for token in base if token not in tuned]
    new = [token for token in tuned if token not in base]
    size = f"{len(base):,} tokens", f"{len(tuned):,} tokens"
    if moved:
        first = sorted(moved, key=lambda token: base[token])[:SHOWN]
        ids = [", ".join(f"{token!r} {side[token]}" for token in first) for side in (base, tuned)]
        yield Change(
            where="tokenizer", what="token ids", base=cut(ids[0]), tuned=cut(ids[1]), judged="warn",
            kind="tokenizer_changes",
            meaning=f"{len(moved):,} tokens have other ids: their embeddings are those of other tokens",
        )  # fmt: skip
    if gone:
        yield Change(
            where="tokenizer", what="tokens removed", base=size[0], tuned=size[1], judged="warn",
            kind="tokenizer_changes", meaning=cut(f"{len(gone):,} tokens, such as {_some(gone)}"),
        )  # fmt: skip
    if new:
        yield Change(
            where="tokenizer", what="tokens added", base=size[0], tuned=size[1], judged="info",
            meaning=cut(f"{len(new):,} tokens, such as {_some(new)}"),
        )  # fmt: skip


def _pipeline(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Iterator[Change]:
    parts: dict[str, tuple[Any, Any]] = {part: (base.get(part), tuned.get(part)) for part in PIPELINE}
    models = [dict(mapping(side.get("model")), vocab=None) for side in (base, tuned)]
    # Merges are pairs in one version of the library and joined by a space in another.
    for model in models:
        merges = model.get("merges")
        if isinstance(merges, list):
            model["merges"] = [" ".join(map(str, m)) if isinstance(m, list) else m for m in merges]
    parts["model"] = models[0], models[1]
    for part, (ours, theirs) in parts.items():
        if ours != theirs:
            after = part in ("post_processor", "decoder")
            meaning = "texts are framed or decoded otherwise" if after else "texts are split otherwise"
            yield Change(
                where="tokenizer", what=part, base=cell(_without(ours, theirs)),
                tuned=cell(_without(theirs, ours)), judged="warn", kind="tokenizer_changes", meaning=meaning,
            )  # fmt: skip


def _without(ours: Any, theirs: Any) -> Any:
    """The entries of a part that the other side has otherwise."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return {key: value for key, value in ours.items() if theirs.get(key) != value}
    return ours


def _template(base: ModelFiles, tuned: ModelFiles) -> Iterator[Change]:
    if base.template == tuned.template:
        return
    described = [
        f"{len(side.template.splitlines())} lines" if side.template else NONE for side in (base, tuned)
    ]
    if base.template is None:
        judged, meaning = "info", "tuned brings a chat template, which base lacks"
    elif tuned.template is None:
        judged, meaning = "warn", "base has a chat template and tuned none: chats cannot be formatted"
    else:
        judged, meaning = "warn", "chats are formatted otherwise; the table `template` has the difference"
    yield Change(
        where="template", what="chat template", base=described[0], tuned=described[1],
        judged="warn" if judged == "warn" else "info", meaning=meaning,
        kind="template_changed" if judged == "warn" else "",
    )  # fmt: skip


def _generation(base: ModelFiles, tuned: ModelFiles) -> Iterator[Change]:
    """Settings of generation, without the ids of special tokens, which have rules of their own."""
    if bool(base.generation) != bool(tuned.generation):
        present = ["present" if side.generation else NONE for side in (base, tuned)]
        yield Change(
            where="generation", what="generation_config.json", base=present[0], tuned=present[1],
            judged="info", meaning="without it, generation follows config.json",
        )  # fmt: skip
        return
    skipped = ("eos_token_id", "transformers_version", "_from_model_config")
    for key in sorted({*base.generation, *tuned.generation}.difference(skipped)):
        values = base.generation.get(key), tuned.generation.get(key)
        if values[0] != values[1]:
            yield Change(
                where="generation", what=key, base=cell(values[0]), tuned=cell(values[1]), judged="info",
                meaning="a default of generation",
            )  # fmt: skip


def _stops(base: ModelFiles, tuned: ModelFiles) -> Iterator[Change]:
    """Where generation stops, whether that is where a turn ends, and padding."""
    ids = [sorted(side.stops) for side in (base, tuned)]
    texts = [", ".join(_token(side, index) for index in side.stops) or NONE for side in (base, tuned)]
    ends = [side.end_of_turn() for side in (base, tuned)]
    misses = [
        end is not None and side.vocabulary.get(end) is not None and side.vocabulary[end] not in stops
        for end, side, stops in zip(ends, (base, tuned), ids, strict=True)
    ]
    inherited = misses[0] and ids[0] == ids[1] and ends[0] == ends[1]
    if misses[1]:
        consequence = "as in base" if inherited else "a reply runs on until its length is exhausted"
        yield Change(
            where="generation", what="eos_token_id", base=texts[0], tuned=texts[1],
            judged="info" if inherited else "warn", kind="" if inherited else "lost_stops",
            meaning=f"a turn ends with {ends[1]!r}, at which generation does not stop: {consequence}",
        )  # fmt: skip
    elif ids[0] != ids[1]:
        lost = [index for index in ids[0] if index not in ids[1]]
        # Another token ends a turn now, and generation stops there: a chat template was learnt.
        moved = not ids[1] or (bool(lost) and ends[0] == ends[1])
        yield Change(
            where="generation", what="eos_token_id", base=texts[0], tuned=texts[1],
            judged="warn" if moved else "info", kind="lost_stops" if moved else "",
            meaning="generation no longer stops where base's did" if moved
            else "generation stops elsewhere, where turns of tuned end",
        )  # fmt: skip
    size = _field(tuned, "vocab_size")
    beyond = [index for index in ids[1] if isinstance(size, int) and index >= size]
    if beyond:
        yield Change(
            where="generation", what="eos_token_id", base=texts[0], tuned=texts[1], judged="warn",
            kind="lost_stops", meaning=f"id {beyond[0]} is beyond tuned's {size:,} tokens: never generated",
        )  # fmt: skip
    for name in ("pad_token_id", "bos_token_id"):
        values = [_field(side, name) for side in (base, tuned)]
        if values[0] != values[1]:
            yield Change(
                where="config", what=name, base=cell(values[0]), tuned=cell(values[1]), judged="info",
                meaning="the id of padding" if name.startswith("pad") else "the id that begins a text",
            )  # fmt: skip


def _damaged(base: ModelFiles, tuned: ModelFiles) -> Iterator[Change]:
    for side, files in (("base", base), ("tuned", tuned)):
        for name, reason in files.damaged.items():
            cells = {"base": "", "tuned": "", side: "not readable"}
            yield Change(
                where="files", what=name, judged="warn", meaning=cut(reason), kind="damaged", **cells
            )


def _field(side: ModelFiles, name: str, default: Any = None) -> Any:
    """A field of config.json, or of the text model in it."""
    inner = mapping(side.config.get("text_config")).get(name)
    return next((item for item in (side.config.get(name), inner) if item is not None), default)


def _token(side: ModelFiles, index: int) -> str:
    """An id with its token."""
    text = next((token for token, other in side.vocabulary.items() if other == index), None)
    return f"{index} {text!r}" if text is not None else str(index)


def _some(items: list[str]) -> str:
    return ", ".join(map(repr, items[:SHOWN]))


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return NONE
    return cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def cut(text: str) -> str:
    """A text on one printable line of limited length."""
    text = "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"
