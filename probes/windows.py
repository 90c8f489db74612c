"""Sequences longer than a model takes, in windows that overlap by half."""

from dataclasses import replace

from probes.batches import Example


def windows(example: Example, longest: int) -> list[Example]:
    """The example in windows that a model takes; one that is short enough is the only one, as it is.

    Windows begin `longest` // 2 tokens apart, each with the special tokens that begin the sequence: a model
    that was trained with a BOS does not do without. A token is scored in the first window that holds it,
    which of all that do has the most tokens before it; so each is scored once.

    Args:
        longest: most tokens of a window, special ones included.

    Raises:
        ValueError: the special tokens leave no room.
    """
    if len(example.ids) <= longest:
        return [example]
    head = example.ids[: example.head]
    ids, scored = example.ids[len(head) :], example.scored[len(head) :]
    room = longest - len(head)
    # A window's first token can only be scored behind another.
    step = min(longest // 2, room if head else room - 1)
    if step < 1:
        raise ValueError(f"windows of {longest} tokens leave no room for a scored token")
    made: list[Example] = []
    done = 0
    while done < len(ids):
        start = len(made) * step
        stop = start + room
        fresh = [False] * (len(head) + done - start) + scored[done:stop]
        made.append(replace(example, ids=head + ids[start:stop], scored=fresh))
        done = stop
    return made
