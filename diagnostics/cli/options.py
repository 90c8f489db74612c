"""The options that several commands share, declared once."""

import functools
from collections.abc import Callable
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

Texts = list[str] | None
ROWS, RUN, MACHINE, OUTPUT = "Rows", "What is measured", "Machine", "Output"

Base = Annotated[str, typer.Argument(metavar="BASE", help="Directory, file or hub id (`org/name@revision`).")]
Tuned = Annotated[str, typer.Argument(metavar="TUNED", help="The same, or an adapter.")]
Out = Annotated[
    Path,
    typer.Option(
        "--out", metavar="DIR", help="Output directory; created if missing.", rich_help_panel=OUTPUT
    ),
]
NewOut = Annotated[
    Path,
    typer.Option(
        "--out", metavar="DIR", help="Output directory; must be new or empty.", rich_help_panel=OUTPUT
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.", rich_help_panel=OUTPUT)]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", help="Print nothing; see the exit code and the files.", rich_help_panel=OUTPUT),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Print the notes too, and uncut lines.", rich_help_panel=OUTPUT)
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over; ignore earlier results in --out.", rich_help_panel=OUTPUT)
]
Chat = Annotated[
    bool,
    typer.Option("--chat-template", help="Wrap each row as a user message.", rich_help_panel=ROWS),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run code from the checkpoint's repository.", rich_help_panel=MACHINE
    ),
]
Device = Annotated[str, typer.Option(metavar="D", help="auto, cpu, cuda or cuda:N.", rich_help_panel=MACHINE)]
Engine = Annotated[
    str,
    typer.Option(
        metavar="E", help="local, local:N, dask://HOST:PORT or ray://HOST:PORT.", rich_help_panel=MACHINE
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="TUNESCOPE_CACHE",
        help="Keep factorizations of the base for the next audit; safe to delete.",
        rich_help_panel=MACHINE,
    ),
]
CacheGB = Annotated[
    float,
    typer.Option(
        "--cache-gb",
        metavar="N",
        envvar="TUNESCOPE_CACHE_GB",
        help="Largest size of the cache in GB.",
        rich_help_panel=MACHINE,
    ),
]


def rows_of(text: str, metavar: str = "F") -> Any:
    """An option that names files of rows; it may be given several times."""
    return typer.Option(metavar=metavar, help=text, rich_help_panel=ROWS)


def run_options(
    task: Annotated[Texts, rows_of("Held-out rows of the tuned task.")] = None,
    keep: Annotated[Texts, rows_of("Rows of what must be retained.")] = None,
    guard: Annotated[Texts, rows_of("Rows of what must never fail.")] = None,
    ood: Annotated[Texts, rows_of("Out-of-distribution rows, named.", "NAME=F")] = None,
    train: Annotated[Texts, rows_of("Rows of the training set.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="Read only the first N rows of each file.", rich_help_panel=ROWS),
    ] = None,
    chat_template: Chat = False,
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate", help="Allow different tokenizers: nats per byte.", rich_help_panel=ROWS
        ),
    ] = False,
    only: Annotated[
        Texts,
        typer.Option(metavar="NAMES", help="Run only these analyses, as a,b,c.", rich_help_panel=RUN),
    ] = None,
    skip: Annotated[
        Texts, typer.Option(metavar="NAMES", help="Leave these analyses out.", rich_help_panel=RUN)
    ] = None,
    settings: Annotated[
        Texts,
        typer.Option("--set", metavar="ANALYSIS.PARAM=VALUE", help="Set a parameter.", rich_help_panel=RUN),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="F", help="TOML file of thresholds.", rich_help_panel=RUN)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of random draws.", rich_help_panel=RUN)] = 0,
    device: Device = "auto",
    dtype: Annotated[
        str | None, typer.Option(metavar="D", help="dtype of the models.", rich_help_panel=MACHINE)
    ] = None,
    engine: Engine = "local",
    cache: Cache = None,
    cache_gb: CacheGB = 20,
    trust_remote_code: Trust = False,
    fresh: Fresh = False,
) -> dict[str, Any]:
    """The options of every command that audits, as keyword arguments of `diagnostics.audit.audit`."""
    from diagnostics.cli.settings import parse_settings

    def names(texts: Texts) -> list[str]:
        return [name.strip() for text in texts or () for name in text.split(",") if name.strip()]

    return {
        "task": task or (),
        "keep": keep or (),
        "guard": guard or (),
        "ood": ood or (),
        "train": train or (),
        "limit": limit,
        "chat_template": chat_template,
        "approximate": approximate,
        "trust_remote_code": trust_remote_code,
        "only": names(only),
        "skip": names(skip),
        "settings": parse_settings(settings or ()),
        "policy": policy,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "engine": engine,
        "cache": open_cache(cache, cache_gb),
        "fresh": fresh,
    }


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the `**options` of a command by the options of `run_options`."""
    parameters = [p for p in signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        of_command = {p.name: values.pop(p.name) for p in parameters}
        command(**of_command, **run_options(**values))

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
