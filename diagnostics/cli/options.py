"""The options that several commands share, declared once."""

import functools
from collections.abc import Callable
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

Texts = list[str] | None
ROWS, RUN, MACHINE, OUTPUT = "Rows", "What is measured", "Machine", "Output"


def option(panel: str, text: str, *flags: str, **details: Any) -> Any:
    """An option in a panel of `--help`."""
    return typer.Option(*flags, help=text, rich_help_panel=panel, **details)


Base = Annotated[str, typer.Argument(metavar="BASE", help="Directory, file or hub id (`org/name@revision`).")]
Tuned = Annotated[str, typer.Argument(metavar="TUNED", help="The same, or an adapter.")]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="A",
        help="The adapter that was merged into TUNED: check the merge.",
        rich_help_panel=RUN,
    ),
]
PolicyFile = Annotated[str | None, option(RUN, "TOML file of thresholds.", "--policy", metavar="F")]
Out = Annotated[Path, option(OUTPUT, "Output directory; created if missing.", "--out", metavar="DIR")]
NewOut = Annotated[Path, option(OUTPUT, "Output directory; must be new or empty.", "--out", metavar="DIR")]
Json = Annotated[bool, option(OUTPUT, "Print JSON only.", "--json")]
Quiet = Annotated[bool, option(OUTPUT, "Print nothing; see the exit code and the files.", "--quiet")]
Verbose = Annotated[bool, option(OUTPUT, "Print the notes too, and uncut lines.", "--verbose")]
Fresh = Annotated[bool, option(OUTPUT, "Start over; ignore earlier results in --out.", "--fresh")]
Replace = Annotated[bool, option(OUTPUT, "Write into --out even if it holds something else.", "--replace")]
Chat = Annotated[bool, option(ROWS, "Wrap each row as a user message.", "--chat-template")]
Trust = Annotated[bool, option(MACHINE, "Run code from the checkpoint's repository.", "--trust-remote-code")]
Device = Annotated[str, option(MACHINE, "auto, cpu, cuda or cuda:N.", metavar="D")]
Engine = Annotated[str, option(MACHINE, "local, local:N, dask://HOST:PORT or ray://HOST:PORT.", metavar="E")]
CACHE_HELP = "Keep factorizations of the base for the next audit; safe to delete."
Cache = Annotated[Path | None, option(MACHINE, CACHE_HELP, metavar="DIR", envvar="TUNESCOPE_CACHE")]
CacheGB = Annotated[
    float,
    option(
        MACHINE, "Largest size of the cache in GB.", "--cache-gb", metavar="N", envvar="TUNESCOPE_CACHE_GB"
    ),
]


def run_options(
    task: Annotated[Texts, option(ROWS, "Held-out rows of the tuned task.", metavar="F")] = None,
    keep: Annotated[Texts, option(ROWS, "Rows of what must be retained.", metavar="F")] = None,
    guard: Annotated[Texts, option(ROWS, "Rows of what must never fail.", metavar="F")] = None,
    ood: Annotated[Texts, option(ROWS, "Out-of-distribution rows, named.", metavar="NAME=F")] = None,
    train: Annotated[Texts, option(ROWS, "Rows of the training set.", metavar="F")] = None,
    limit: Annotated[
        int | None, option(ROWS, "Read only the first N rows of each file.", metavar="N")
    ] = None,
    chat_template: Chat = False,
    approximate: Annotated[
        bool, option(ROWS, "Nats per byte even where tokenizers agree.", "--approximate")
    ] = False,
    only: Annotated[Texts, option(RUN, "Run only these analyses, as a,b,c.", metavar="NAMES")] = None,
    skip: Annotated[Texts, option(RUN, "Leave these analyses out.", metavar="NAMES")] = None,
    settings: Annotated[
        Texts, option(RUN, "Set a parameter.", "--set", metavar="ANALYSIS.PARAM=VALUE")
    ] = None,
    policy: PolicyFile = None,
    seed: Annotated[int, option(RUN, "Seed of random draws.", metavar="N")] = 0,
    device: Device = "auto",
    dtype: Annotated[str | None, option(MACHINE, "dtype of the models.", metavar="D")] = None,
    engine: Engine = "local",
    cache: Cache = None,
    cache_gb: CacheGB = 20,
    trust_remote_code: Trust = False,
    fresh: Fresh = False,
    replace: Replace = False,
) -> None:
    """Declares the options of every command that audits; `audit_arguments` reads them."""


def audit_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """The values of `run_options` as keyword arguments of `diagnostics.audit.audit`."""
    from diagnostics.cli.settings import parse_settings
    from diagnostics.core.inputs import ROLES

    def names(texts: Texts) -> list[str]:
        return [name.strip() for text in texts or () for name in text.split(",") if name.strip()]

    cache = open_cache(values.pop("cache"), values.pop("cache_gb"))
    values |= {role: values[role] or () for role in ROLES}
    values |= {"only": names(values["only"]), "skip": names(values["skip"])}
    return values | {"settings": parse_settings(values["settings"] or ()), "cache": cache}


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the `**options` of a command by the options of `run_options`."""
    parameters = [p for p in signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        of_command = {p.name: values.pop(p.name) for p in parameters}
        command(**of_command, **audit_arguments(values))

    arguments = [p for p in parameters if p.default is p.empty]
    shared = list(signature(run_options).parameters.values())
    declared = [*arguments, *shared, *(p for p in parameters if p not in arguments)]  # as --help shows them
    # Keyword-only: a signature with defaults before positional arguments would be refused.
    run.__signature__ = Signature([p.replace(kind=p.KEYWORD_ONLY) for p in declared])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in declared}
    return run


def open_cache(directory: Path | None, gigabytes: float) -> Any:
    """The cache of factorizations in a directory; None without one."""
    if directory is None:
        return None
    from diagnostics.store.factor_cache import FactorCache

    return FactorCache.at(directory, int(gigabytes * 1e9))
