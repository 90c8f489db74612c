"""From a reference to files: local paths, hub ids, and the weight files of a directory."""

import os
import re
from pathlib import Path, PurePosixPath

from probes.errors import InputError
from probes.files.sources import SafetensorsSource, Source, TorchSource
from probes.files.untrusted import confined, read_json

HUB_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*(?:@[\w./-]+)?")
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Configuration, tokenizer and weights at the top of a repository; no code, no copies for other frameworks.
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.jinja"]
UNWANTED = ["*/*", "consolidated*"]
WANTED_TORCH = ["pytorch_model*.bin", "adapter_model.bin"]


def locate(ref: str | Path, *, revision: str | None = None) -> Path:
    """The file or directory of a reference; a hub id is downloaded unless it is cached.

    Raises:
        InputError: it does not exist, or the hub has no such repository or revision.
    """
    path = Path(ref)
    try:
        path = path.expanduser()
        exists = path.exists()
    except (OSError, RuntimeError):  # a name that is too long, or a home that nobody has
        exists = False
    if exists:
        if revision is not None:
            raise InputError(f"{ref}: is a local path, and those have no revision; leave revision out")
        return path
    text = str(ref)
    if (
        isinstance(ref, Path)
        or not HUB_ID.fullmatch(text)
        or ".." in text
        or path.suffix in (".safetensors", *TORCH_SUFFIXES)
    ):
        raise InputError(f"{ref}: no such file or directory")
    repository, _, named = text.partition("@")
    if named and revision is not None and named != revision:
        raise InputError(
            f"{ref}: names revision {named!r}, but revision={revision!r} was given; give one of them"
        )
    return _download(repository, revision or named or None)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{repository}@{revision}" if revision else repository

    def fetch(wanted: list[str]) -> Path:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED)
        )

    try:
        directory = fetch(WANTED)
        return directory if any(directory.glob("*.safetensors")) else fetch([*WANTED, *WANTED_TORCH])
    except GatedRepoError as error:
        raise InputError(f"{what}: is open to accepted users only; accept its terms, then log in") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{what}: {repository} has no such revision on the hub") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{what}: no such local path, and no such repository on the hub, or private"
        ) from error
    except (HFValidationError, LocalEntryNotFoundError) as error:
        cached = _cached(repository, revision) if isinstance(error, LocalEntryNotFoundError) else None
        if cached is not None:
            return cached
        raise InputError(
            f"{what}: no such local path, not in the Hugging Face cache, and the hub cannot be reached; "
            "check the spelling, or download it while online"
        ) from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{what}: cannot be downloaded ({type(error).__name__}: {reason})") from error


def _cached(repository: str, revision: str | None) -> Path | None:
    """A cached snapshot of another program, which may be incomplete and still be enough."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "adapter_config.json", *MODEL_FILES):
        path = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def open_files(path: Path) -> Source:
    """The weights of a file, of an index and its shards, or of a model directory.

    Raises:
        InputError: no weights, an index that names missing or outside files, a damaged file.
    """
    if path.name.endswith(".index.json"):
        return _indexed(path.parent, path)
    if path.is_file():
        return _open([path])
    if not path.is_dir():
        raise InputError(f"{path}: neither a file nor a directory")
    for name in MODEL_FILES:
        if (path / name).is_file():
            file = confined(path / name, path)
            return _indexed(path, file) if name.endswith(".json") else _open([file])
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if len(files) == 1:
        return _open([confined(files[0], path)])
    if files:
        names = ", ".join(file.name for file in files[:3])
        more = ", …" if len(files) > 3 else ""
        raise InputError(f"{path}: {len(files)} safetensors files ({names}{more}) and no index; name one")
    raise InputError(f"{path}: no weights (none of {', '.join(MODEL_FILES)}); is it a model directory?")


def _open(paths: list[Path]) -> SafetensorsSource | TorchSource:
    suffixes = {path.suffix for path in paths}
    if suffixes == {".safetensors"}:
        return SafetensorsSource(paths)
    if suffixes <= set(TORCH_SUFFIXES):
        return TorchSource(paths)
    raise InputError(f"{paths[0]}: weights are read from .safetensors, .bin, .pt or .pth files")


def adapter_files(path: Path) -> tuple[Path, Path] | None:
    """Configuration and weights of an adapter, if that is what a directory or a file is.

    Raises:
        InputError: half an adapter, or an adapter and a model in one directory.
    """
    directory = path if path.is_dir() else path.parent
    settings = directory / "adapter_config.json"
    weights = next((directory / name for name in ADAPTER_FILES if (directory / name).is_file()), None)
    if path.is_file():
        if path.name not in ADAPTER_FILES:
            return None
        weights = path
    if weights is None and not settings.is_file():
        return None
    model = [name for name in MODEL_FILES if (directory / name).is_file()]
    if path.is_dir() and model and weights is not None:
        raise InputError(
            f"{path}: holds a model and an adapter; name the file that is meant, {model[0]} or {weights.name}"
        )
    if path.is_dir() and model:
        return None
    if weights is None:
        raise InputError(f"{path}: has adapter_config.json but no weights ({' or '.join(ADAPTER_FILES)})")
    if not settings.is_file():
        raise InputError(f"{path}: has adapter weights but no adapter_config.json, which says what they mean")
    return confined(settings, directory), weights if path.is_file() else confined(weights, directory)


def _indexed(directory: Path, index: Path) -> Source:
    """The shards of an index, checked against it."""
    weights = read_json(index).get("weight_map")
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(file, str) for file in weights.values())
    ):
        raise InputError(f"{index}: has no weight_map from tensors to files")
    shards = {file: inside(directory, file, index) for file in sorted(set(weights.values()))}
    source = _open(list(shards.values()))
    for name, file in weights.items():
        if name not in source.headers or source.file(name).name != Path(file).name:
            raise InputError(
                f"{index}: says that {file} holds {name!r}, but it does not; copy the checkpoint again"
            )
    return source


def inside(directory: Path, name: str, index: Path) -> Path:
    """The file `name` in a directory; neither its name nor a link may lead elsewhere."""
    if (
        PurePosixPath(name).is_absolute()
        or ".." in PurePosixPath(name).parts
        or "\\" in name
        or os.path.isabs(name)
    ):
        raise InputError(f"{index}: names the file {name!r}, which is outside of the checkpoint; not opened")
    path = directory / name
    try:
        exists = path.exists()
    except OSError:  # a name that is too long
        exists = False
    if not exists:
        raise InputError(f"{index}: names {name!r}, which is missing from {directory}; copy or download it")
    if not confined(path, directory).is_file():
        raise InputError(f"{index}: names {name!r}, which is not a file")
    return path
