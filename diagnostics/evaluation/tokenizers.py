"""One tokenizer for base and tuned, or the reason why there is none."""

from typing import Any

from probes.errors import InputError
from probes.text.encode import special_tokens


def common_tokenizer(base: Any, tuned: Any, *, approximate: bool) -> tuple[Any | None, int | None, list[str]]:
    """A tokenizer for both models, or None if `approximate`; the number of tokens both know, and notes."""
    shared = shared_tokenizer(base, tuned)
    if shared is not None:
        tokenizer, size, notes = shared
        return tokenizer, size, [f"{note}, with probabilities renormalised over the rest" for note in notes]
    if approximate:
        notes = [
            "approximate: the tokenizers differ; lengths are bytes, means are per byte of the same texts"
        ]
        framed = [bool(special_tokens(tokenizer)[0]) for tokenizer in (base, tuned)]
        if framed[0] != framed[1]:
            scoring, other = ("base", "tuned") if framed[0] else ("tuned", "base")
            notes.append(
                f"approximate: only {scoring} scores the first token of each text, because the tokenizer of "
                f"{other} puts no token in front of it"
            )
        return None, None, notes
    raise InputError(
        f"{first_difference(base, tuned)}, so ratios of tokens mean nothing; an audit with --approximate "
        "compares whole texts, in nats per byte"
    )


def shared_tokenizer(base: Any, tuned: Any) -> tuple[Any, int | None, list[str]] | None:
    """The smaller of two tokenizers if the larger only appends tokens, its size if they differ, and notes."""
    vocabularies = base.get_vocab(), tuned.get_vocab()
    if vocabularies[0] == vocabularies[1]:
        return tuned, None, []
    smaller, larger = sorted(vocabularies, key=len)
    added = [index for token, index in larger.items() if token not in smaller]
    size = max(smaller.values()) + 1
    if any(larger.get(token) != index for token, index in smaller.items()) or min(added) < size:
        return None
    tokenizer, side = (base, "tuned") if smaller is vocabularies[0] else (tuned, "base")
    return tokenizer, size, [f"{side} has {len(added)} more tokens; texts are read without them"]


def bos_notes(base: Any, used: Any) -> list[str]:
    """The note that texts lack the BOS that base expects; empty if they have it."""
    bos = base.bos_token_id
    if bos is None or bos not in special_tokens(base)[0] or bos in special_tokens(used)[0]:
        return []
    return [
        f"texts do not begin with {base.bos_token!r} as base expects, because the tokenizer of tuned does "
        "not add it. That alone raises base's loss on the first tokens. If tuned was trained with it, save "
        "the tokenizer of base with tuned"
    ]


def first_difference(base: Any, tuned: Any) -> str:
    """The first token in which two tokenizers differ, as a sentence."""
    in_base, in_tuned = base.get_vocab(), tuned.get_vocab()
    token = min(
        (token for token in {*in_base, *in_tuned} if in_base.get(token) != in_tuned.get(token)),
        key=lambda token: (in_base.get(token, len(in_base) + len(in_tuned)), token),
    )
    return (
        f"the tokenizers of base and tuned differ: token {token!r} is {in_base.get(token, 'unknown')} in "
        f"base and {in_tuned.get(token, 'unknown')} in tuned"
    )
