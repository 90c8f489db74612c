"""The files outside the weights: configuration, tokenizer, chat template, generation settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from probes.checkpoints.checkpoint import Checkpoint
from probes.errors import InputError
from probes.files.untrusted import confined, read_json

# Of tokenizers that bring no tokenizer.json; compared by their bytes.
SLOW = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "sentencepiece.bpe.model")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
LONGEST = 10**15  # tokenizers without a limit say a larger one


@dataclass(kw_only=True)
class ModelFiles:
    """The files of one side.

    Attributes:
        config: config.json.
        directories: where files are looked for, an adapter's own before its base's.
        damaged: files that cannot be read, and why.
    """

    config: Mapping[str, Any]
    directories: tuple[Path, ...] = ()
    damaged: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "ModelFiles":
        """The files of a checkpoint; those that an adapter lacks are its base's."""
        sides = (checkpoint, checkpoint.base)
        directories = tuple(side.directory for side in sides if side is not None and side.directory)
        return cls(config=checkpoint.config, directories=directories)

    def path(self, name: str) -> Path | None:
        """A file in the first directory that has it."""
        for directory in self.directories:
            if (directory / name).is_file():
                try:
                    return confined(directory / name, directory)
                except InputError as error:
                    self.damaged[name] = str(error)
        return None

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file; {} where there is none, or none that can be read."""
        path = self.path(name)
        try:
            return read_json(path) if path else {}
        except InputError as error:
            self.damaged[name] = str(error)
            return {}

    def text(self, name: str) -> str | None:
        """A text file; None where there is none."""
        path = self.path(name)
        try:
            return path.read_text(encoding="utf-8") if path else None
        except (OSError, ValueError) as error:
            self.damaged[name] = str(error)
            return None

    @cached_property
    def generation(self) -> dict[str, Any]:
        """generation_config.json."""
        return self.json("generation_config.json")

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """tokenizer.json."""
        return self.json("tokenizer.json")

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json."""
        return self.json("tokenizer_config.json")

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id, added tokens included; {} without a tokenizer.json."""
        vocabulary = mapping(self.tokenizer.get("model")).get("vocab")
        if isinstance(vocabulary, list):  # Unigram: [token, score]
            pairs = [(entry[0], index) for index, entry in enumerate(vocabulary) if isinstance(entry, list)]
            vocabulary = {str(token): index for token, index in pairs}
        extra = {str(token.get("content")): token.get("id") for token in self.added_tokens}
        tokens = {**mapping(vocabulary), **extra}
        return {token: index for token, index in tokens.items() if isinstance(index, int)}

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        """The entries of tokenizer.json on added tokens."""
        added = self.tokenizer.get("added_tokens")
        return [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []

    @cached_property
    def special_texts(self) -> set[str]:
        """The special tokens among the added ones."""
        marked = {str(token.get("content")) for token in self.added_tokens if token.get("special")}
        return marked | {text for text in self.special.values() if text}

    @cached_property
    def special(self) -> dict[str, str]:
        """The text of each special token that has a role."""
        roles = {**self.json("special_tokens_map.json"), **self.tokenizer_config}
        texts = {}
        for role in SPECIAL:
            value = roles.get(role)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                texts[role] = text
        return texts

    @cached_property
    def template(self) -> str | None:
        """The chat template; None without one."""
        text = self.text("chat_template.jinja")
        if text is None:
            text = self.tokenizer_config.get("chat_template")
        if text is None:
            text = self.json("chat_template.json").get("chat_template")
        if isinstance(text, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, dict)}
            text = named.get("default") or next(iter(named.values()), None)
        return text if isinstance(text, str) else None

    @cached_property
    def context(self) -> int | None:
        """Most tokens that the tokenizer lets through; None without a limit."""
        length = self.tokenizer_config.get("model_max_length")
        return length if isinstance(length, int) and length < LONGEST else None

    @property
    def stops(self) -> list[int]:
        """The ids at which generation stops: of generation_config.json, else of config.json."""
        text = mapping(self.config.get("text_config"))
        for source in [self.generation] if self.generation else [self.config, text]:
            value = source.get("eos_token_id")
            if isinstance(value, int):
                return [value]
            if isinstance(value, list):
                return [index for index in value if isinstance(index, int)]
        return []

    def slow_files(self) -> dict[str, bytes]:
        """The files of a tokenizer without a tokenizer.json."""
        paths = {name: self.path(name) for name in SLOW}
        return {name: path.read_bytes() for name, path in paths.items() if path}

    def end_of_turn(self) -> str | None:
        """The token that ends a turn: the chat template's after an answer, else the tokenizer's EOS."""
        after = _after_answer(self.template, self.special) if self.template else None
        if after:
            places = {text: after.find(text) for text in self.special_texts if text in after}
            if places:
                return min(places, key=lambda text: (places[text], -len(text)))
        return self.special.get("eos_token")


def mapping(value: Any) -> Mapping[Any, Any]:
    """A JSON object, or an empty one in the place of anything else."""
    return value if isinstance(value, Mapping) else {}


ANSWER = "tunescope-answer"


def _after_answer(template: str, special: Mapping[str, str]) -> str | None:
    """What a chat template writes after an answer; None where it cannot be rendered."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if "range" in template:  # a stranger's loops, which might never end
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
    try:
        rendered = render_jinja_template(conversations=[turns], chat_template=template, **special)
    except Exception:  # it may ask for anything; then the tokenizer's EOS is what is known
        return None
    texts = rendered[0] if isinstance(rendered, tuple) else rendered
    text = texts[0] if isinstance(texts, list) else texts
    return str(text).rpartition(ANSWER)[2] if ANSWER in str(text) else None
