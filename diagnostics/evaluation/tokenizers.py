"""One tokenizer for base and tuned, or why there is none."""

from typing import Any

from probes.errors import InputError
from probes.text.encode import special_tokens


def common(base: Any, tuned: Any, *, approximate: bool) -> tuple[Any | None, int | None, list[str]]:
    """The tokenizer that both models can read by, how many tokens both know, and what to say of it.

    None for the tokenizer: they differ and that was asked for. None for the tokens: all.

    Raises:
        InputError: the tokenizers differ.
    """
    shared = shared_tokenizer(base, tuned)
    if shared is not None:
        tokenizer, known, said = shared
        return tokenizer, known, [f"{each}, and the others share what probability they have" for each in said]
    if approximate:
        said = ["approximate: the tokenizers differ; lengths are bytes, means per byte of the same texts"]
        begun = [bool(special_tokens(tokenizer)[0]) for tokenizer in (base, tuned)]
        if begun[0] != begun[1]:
            one, two = ("base", "tuned") if begun[0] else ("tuned", "base")
            said.append(
                f"approximate: the first token of each text is scored under {one} alone, because the "
                f"tokenizer of {two} puts none before it"
            )
        return None, None, said
    raise InputError(
        f"{differing(base, tuned)}, so that ratios of tokens mean nothing; an audit with --approximate "
        "compares whole texts, in nats per byte"
    )


def shared_tokenizer(base: Any, tuned: Any) -> tuple[Any, int | None, list[str]] | None:
    """The smaller of two tokenizers if the other only has more tokens behind the same; else None.

    With it how many tokens it has, where the other has more, and what to say of that.
    """
    one, two = base.get_vocab(), tuned.get_vocab()
    if one == two:
        return tuned, None, []
    fewer, more, few = (one, two, base) if len(one) <= len(two) else (two, one, tuned)
    extra = [place for token, place in more.items() if token not in fewer]
    known = max(fewer.values()) + 1
    if any(more.get(token) != place for token, place in fewer.items()) or min(extra) < known:
        return None
    side = "tuned" if few is base else "base"
    return few, known, [f"{side} has {len(extra)} more tokens; texts are read without them"]


def without_bos(base: Any, used: Any) -> list[str]:
    """What to say where texts lack the BOS that base expects, for the tokenizer that is used puts none."""
    bos = base.bos_token_id
    if bos is None or bos not in special_tokens(base)[0] or bos in special_tokens(used)[0]:
        return []
    return [
        f"texts do not begin with {base.bos_token!r} as base expects, for the tokenizer of tuned does not "
        "put it there, and the first tokens cost base nats for that alone; if tuned was trained with it, "
        "save the tokenizer of base with tuned"
    ]


def differing(base: Any, tuned: Any) -> str:
    """The first token in which two tokenizers differ."""
    one, two = base.get_vocab(), tuned.get_vocab()
    token = min(
        (token for token in {*one, *two} if one.get(token) != two.get(token)),
        key=lambda t: (one.get(t, len(one) + len(two)), t),
    )
    return (
        f"the tokenizers of base and tuned differ: token {token!r} is {one.get(token, 'unknown')} in "
        f"base and {two.get(token, 'unknown')} in tuned"
    )
