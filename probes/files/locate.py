"""From a reference to files: local paths, hub ids, and the weight files of a directory."""

import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath

from probes.errors import IncompleteError, InputError, library_error
from probes.files.gathering import explained
from probes.files.sources import FileSource, SafetensorsSource, Source, TorchSource
from probes.files.untrusted import confined, read_json

HUB_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*(?:@[\w./-]+)?")
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
MODEL_FILES = tuple(f"{file}{kind}" for file in ("model.safetensors", "pytorch_model.bin")
                    for kind in ("", ".index.json"))  # fmt: skip
# One of several files of a model, as transformers numbers them.
SHARD = re.compile(r"(?P<stem>(?!shard-)[\w.-]+)-\d{5}-of-(?P<count>\d{5})(?P<kind>\.safetensors|\.bin)")
# A training leaves these beside the weights.
OF_TRAINING = ("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
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
    path, text = Path(ref), str(ref)
    with suppress(OSError, RuntimeError):  # a name that is too long, or a home that nobody has
        path = path.expanduser()
        if path.exists():
            if revision is not None:
                raise InputError(f"{ref}: is a local path, and those have no revision; leave revision out")
            return path
    is_file = isinstance(ref, Path) or path.suffix in (".safetensors", *TORCH_SUFFIXES)
    if is_file or not HUB_ID.fullmatch(text) or ".." in text:
        raise InputError(f"{ref}: no such file or directory")
    repository, _, named = text.partition("@")
    if named and revision is not None and named != revision:
        raise InputError(f"{ref}: names revision {named!r}, but revision={revision!r} was given; give one")
    return _download(repository, revision or named or None)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    what = f"{repository}@{revision}" if revision else repository
    fetch = partial(snapshot_download, repository, revision=revision, ignore_patterns=UNWANTED)
    try:
        directory = Path(fetch(allow_patterns=WANTED))
        if any(directory.glob("*.safetensors")):
            return directory
        return Path(fetch(allow_patterns=[*WANTED, *WANTED_TORCH]))
    except errors.GatedRepoError as error:
        raise InputError(f"{what}: is open to accepted users only; accept its terms, then log in") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{what}: {repository} has no such revision on the hub") from error
    except errors.RepositoryNotFoundError as error:
        message = f"{what}: no such local path, and no such repository on the hub, or private"
        raise InputError(message) from error
    except (errors.HFValidationError, errors.LocalEntryNotFoundError) as error:
        unreachable = isinstance(error, errors.LocalEntryNotFoundError)
        if unreachable and (cached := _cached(repository, revision)):
            return cached
        raise InputError(
            f"{what}: no such local path, not in the Hugging Face cache, and the hub cannot be reached; "
            "check the spelling, or download it while online"
        ) from error
    except Exception as error:
        raise InputError(f"{what}: cannot be downloaded ({library_error(error)})") from error


def _cached(repository: str, revision: str | None) -> Path | None:
    """A cached snapshot of another program, which may be incomplete and still be enough."""
    from huggingface_hub import try_to_load_from_cache

    names = ("config.json", "adapter_config.json", *MODEL_FILES)
    paths = (try_to_load_from_cache(repository, name, revision=revision) for name in names)
    return next((Path(path).parent for path in paths if isinstance(path, str)), None)


def open_files(path: Path) -> Source:
    """The weights of a file, of an index and its shards, or of a model directory.

    Raises:
        InputError: no weights, an index that names missing or outside files, a damaged file.
    """
    if path.name.endswith(".index.json"):
        return _indexed(path.parent, path)
    if path.is_file():
        shard = SHARD.fullmatch(path.name)
        if shard and int(shard["count"]) > 1:
            index = f"{shard['stem']}{shard['kind']}.index.json"
            raise InputError(
                f"{path}: is one of {int(shard['count'])} shards; give their directory, or {index}"
            )
        return _open([path])
    if not path.is_dir():
        raise InputError(f"{path}: neither a file nor a directory")
    for name in MODEL_FILES:
        if (path / name).is_file():
            file = confined(path / name, path)
            return _indexed(path, file) if name.endswith(".json") else _open([file])
    _refuse_shards(path)
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if len(files) != 1 and (reason := explained(path)):
        raise InputError(f"{path}: {reason}")
    if not files:
        raise IncompleteError(f"{path}: no weights (none of {', '.join(MODEL_FILES)}); {_hint(path)}")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3]) + (", …" if len(files) > 3 else "")
        raise InputError(f"{path}: {len(files)} safetensors files ({names}) and no index; name one")
    return _open([confined(files[0], path)])


def _refuse_shards(path: Path) -> None:
    """Raise IncompleteError if a directory holds shards of a model without their index."""
    matches = {file.name: match for file in path.iterdir() if (match := SHARD.fullmatch(file.name))}
    if not matches:
        return
    first = min(matches)
    stem, count, kind = matches[first].group("stem", "count", "kind")
    here = f"{len(matches)} of {int(count)} shards are here ({first}…)"
    raise IncompleteError(f"{path}: {here} and no {stem}{kind}.index.json; copy or download what is missing")


def _hint(path: Path) -> str:
    """What may be the matter with a directory without weights."""
    left = [name for name in OF_TRAINING if (path / name).is_file()]
    if left:
        return f"{left[0]} lies there: is it still being written?"
    return "is it a model directory?"


def _open(paths: list[Path]) -> FileSource:
    suffixes = {path.suffix for path in paths}
    if suffixes == {".safetensors"}:
        return SafetensorsSource(paths)
    if suffixes <= set(TORCH_SUFFIXES):
        return TorchSource(paths)
    readable = "weights are read from .safetensors, .bin, .pt or .pth files"
    raise InputError(f"{paths[0]}: {explained(paths[0]) or readable}")


def adapter_files(path: Path) -> tuple[Path, Path] | None:
    """Configuration and weights of an adapter, if that is what a directory or a file is.

    Raises:
        InputError: half an adapter, or an adapter and a model in one directory.
    """
    directory = path if path.is_dir() else path.parent
    settings = directory / "adapter_config.json"
    weights = next((directory / name for name in ADAPTER_FILES if (directory / name).is_file()), None)
    if path.is_file():
        weights = path if path.name in ADAPTER_FILES else None
    if weights is None and (path.is_file() or not settings.is_file()):
        return None
    model = next((name for name in MODEL_FILES if (directory / name).is_file()), None)
    if path.is_dir() and model:
        if weights is None:
            return None
        raise InputError(f"{path}: holds a model and an adapter; name one file, {model} or {weights.name}")
    if weights is None and (directory / "adapters.safetensors").is_file():
        remedy = "fuse it (`mlx_lm.fuse --model BASE --adapter-path DIR`) and give the fused model"
        raise InputError(f"{path}: is an adapter of MLX, whose factors only MLX applies; {remedy}")
    if weights is None:
        if path.is_dir() and (reason := explained(path)):
            raise InputError(f"{path}: {reason}")
        lacking = f"has adapter_config.json but no weights ({' or '.join(ADAPTER_FILES)})"
        raise IncompleteError(f"{path}: {lacking}")
    if not settings.is_file():
        raise InputError(f"{path}: has adapter weights but no adapter_config.json, which says what they mean")
    return confined(settings, directory), weights if path.is_file() else confined(weights, directory)


def _indexed(directory: Path, index: Path) -> Source:
    """The shards of an index, checked against it."""
    weights = read_json(index).get("weight_map") or {}
    files = list(weights.values()) if isinstance(weights, dict) else []
    if not files or not all(isinstance(file, str) for file in files):
        raise InputError(f"{index}: has no weight_map from tensors to files")
    source = _open([inside(directory, file, index) for file in sorted(set(files))])
    for name, file in weights.items():
        if name not in source.headers or source.file(name).name != Path(file).name:
            raise IncompleteError(f"{index}: says that {file} holds {name!r}, but it does not; copy it again")
    return source


def inside(directory: Path, name: str, index: Path) -> Path:
    """The file `name` in a directory; neither its name nor a link may lead elsewhere."""
    outside = os.path.isabs(name) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
    if outside or "\\" in name:
        raise InputError(f"{index}: names the file {name!r}, which is outside of the checkpoint; not opened")
    path, exists = directory / name, False
    with suppress(OSError):  # a name that is too long
        exists = path.exists()
    if not exists:
        raise IncompleteError(
            f"{index}: names {name!r}, which is missing from {directory}; copy or download it"
        )
    if not confined(path, directory).is_file():
        raise InputError(f"{index}: names {name!r}, which is not a file")
    return path
