"""Policies in TOML files: read, and checked against the installed analyses."""

import tomllib
from pathlib import Path

from diagnostics.core.policy import Policy, default_policy, parse
from diagnostics.core.registry import find, installed
from probes.errors import InputError, UnknownNameError
from probes.files.untrusted import one_line

# Of one line: the parser takes the square of the parts of a dotted key, and keys have three.
DOTS = 300


def load_policy(path: str | Path) -> Policy:
    """The default policy, in which a file replaces rules metric by metric.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "policy.toml")
    >>> _ = file.write_text("path.bump_task_nats = {fail = 1}")
    >>> load_policy(file).rules["path"]["bump_task_nats"].fail
    1.0

    Raises:
        InputError: the file is missing or not TOML, or a rule makes no sense.
        UnknownNameError: an unknown analysis, metric, key or parameter; the message lists the known ones.
    """
    with one_line(f"policy {path}"):
        try:
            text = Path(path).read_text(encoding="utf-8")
            if any(line.count(".") > DOTS for line in text.splitlines()):
                raise InputError(f"a line has more than {DOTS} dots")
            tables = tomllib.loads(text)
        except OSError as error:
            raise InputError(f"policy {path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise InputError(f"policy {path}: not a TOML file: {error}") from error
        replacing = parse(tables, origin=f"policy {path}")
        check_names(replacing)
    default = default_policy()
    names = {*default.rules, *replacing.rules}
    rules = {name: {**default.rules.get(name, {}), **replacing.rules.get(name, {})} for name in sorted(names)}
    return Policy(rules, origin=replacing.origin)


def check_names(policy: Policy) -> None:
    """Refuse rules for what is not installed or not measured."""
    for name, rules in policy.rules.items():
        if name not in installed():
            raise UnknownNameError(
                f"{policy.origin}: unknown analysis {name!r}; known: {', '.join(installed())}"
            )
        record = find(name)
        metrics, parameters = list(record.metrics), list(record.parameters)
        for metric, rule in rules.items():
            named = [("parameter ", rule.per, ["", *parameters])]
            if metrics:
                conditions = ("", rule.when, ["", *parameters, *metrics])
                named = [("metric ", metric, metrics), *named, conditions]
            for what, word, names in named:
                if word not in names:
                    has = ", ".join(filter(None, names)) or "none"
                    raise UnknownNameError(f"{policy.origin}: {name} has no {what}{word!r}; it has: {has}")
