"""Errors of the input, which a person can mend and a program can tell from a crash."""


class InputError(ValueError):
    """The input is wrong. The text says what, where, and how to mend it, on one line.

    >>> from probes import open_checkpoint
    >>> open_checkpoint("no/such.safetensors")
    Traceback (most recent call last):
    probes.errors.InputError: no/such.safetensors: no such file or directory
    """


class IncompleteError(InputError):
    """A checkpoint lacks its weights or some of them, as one that is still being written does.

    >>> import tempfile
    >>> from probes import open_checkpoint
    >>> open_checkpoint(tempfile.mkdtemp())
    Traceback (most recent call last):
    probes.errors.IncompleteError: ...: no weights (none of model.safetensors, ...); is it a model directory?
    """


class UnknownNameError(InputError, LookupError):
    """A name that is not known; the text lists the known ones.

    >>> import torch
    >>> from probes import open_checkpoint
    >>> open_checkpoint({"model.layers.0.mlp.up_proj.weight": torch.eye(2)}).tensor("up_proj")
    Traceback (most recent call last):
    probes.errors.UnknownNameError: state dict: has no tensor 'up_proj'; the nearest of its 1: model.layers...
    """


class NotApplicableError(InputError):
    """An analysis does not apply to this kind of model or data; the text says why, and what does.

    An audit of everything skips the analysis. Asked for by name, it is an error of the input. `probes` raises
    it where base and tuned have no model between them.
    """


def library_error(error: BaseException) -> str:
    """The type and the first line of a library's error, for messages."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
