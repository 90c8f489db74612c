"""Checks of an adapter's configuration and of the regular expressions in it, which a stranger may write."""

import re
import time
from collections.abc import Mapping
from typing import Any

import regex

from probes.errors import InputError

# Seconds of processor time for all expressions of one adapter, and the usual time of a match, which is free:
# an adapter may name the rank of each module. Some expressions would run for centuries.
PATIENCE, USUAL = 0.2, 5e-5
# Extra seconds on the clock for a match, on a busy machine.
WAIT = 0.3
# Most characters of one expression.
LONGEST = 500
# Larger than any plausible rank or alpha.
LARGEST = 2**31


def well_formed(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for the first field of adapter_config.json that is read and has another type."""
    for name in ("r", "lora_alpha"):
        if not _number(config.get(name, 8)):
            raise _wrong(where, name, config[name], "a number")
    for name in ("rank_pattern", "alpha_pattern"):
        value = {} if config.get(name) is None else config[name]
        items = value.items() if isinstance(value, Mapping) else [(None, None)]
        if not all(isinstance(pattern, str) and _number(number) for pattern, number in items):
            raise _wrong(where, name, value, "an object of numbers by the names of modules")
    for name in ("modules_to_save", "target_parameters"):
        value = config.get(name) or ()
        if not isinstance(value, list | tuple | set) or not all(isinstance(item, str) for item in value):
            raise _wrong(where, name, value, "a list of names")
    rows = config.get("trainable_token_indices") or []
    for value in rows.values() if isinstance(rows, Mapping) else [rows]:
        ids = value if isinstance(value, list | tuple) else [None]
        if not all(type(token) is int and 0 <= token < LARGEST for token in ids):
            wanted = "a list of token ids, or such lists by module"
            raise _wrong(where, "trainable_token_indices", rows, wanted)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _wrong(where: str, name: str, value: Any, wanted: str) -> InputError:
    return InputError(f"{where}: adapter_config.json: {name} is {str(value)[:80]!r}; it is {wanted}")


class Patterns:
    """Look-up in `rank_pattern` and `alpha_pattern`; an expression that takes too long is an InputError."""

    def __init__(self, where: str):
        self.where = where
        self.left = PATIENCE
        self.compiled: dict[str, Any] = {}

    def value(self, patterns: Mapping[str, Any] | None, key: str, default: Any) -> Any:
        """Value of the first pattern that matches the end of a name (peft.utils.other.get_pattern_key)."""
        items = (patterns or {}).items()
        return next((value for pattern, value in items if self.fits(pattern, key)), default)

    def fits(self, pattern: str, key: str) -> bool:
        """Whether an expression matches the end of a name, from the beginning of one of its parts."""
        if re.fullmatch(r"[\w.]+", pattern):
            return _ends(key, pattern)
        began = time.thread_time()
        try:
            if len(pattern) > LONGEST or self.left <= 0:
                raise TimeoutError
            if pattern not in self.compiled:
                re.compile(pattern)  # accepts what PEFT does; `regex` also has recursion
                self.compiled[pattern] = regex.compile(rf"(.*\.)?({pattern})$")
            # The timeout is on the clock, and a waiting thread computes nothing.
            return self.compiled[pattern].match(key, timeout=self.left + WAIT) is not None
        except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
            raise InputError(f"{self.where}: {pattern!r} is no regular expression ({error})") from error
        except TimeoutError as error:
            problem = f"the regular expression {pattern!r} takes too long; name the modules instead"
            raise InputError(f"{self.where}: {problem}") from error
        finally:
            self.left -= time.thread_time() - began - USUAL


def _ends(key: str, pattern: str) -> bool:
    """`fits` for an expression of names and dots; a dot matches any character."""
    start = len(key) - len(pattern)
    if start < 0 or (start and key[start - 1] != "."):
        return False
    end = len(key)
    for part in reversed(pattern.split(".")):
        if key[end - len(part) : end] != part:
            return False
        end -= len(part) + 1
    return True
