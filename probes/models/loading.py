"""Loading checkpoints as torch models of transformers, with or without adapters.

Weights come from the files that `probes.checkpoints` opens and from nowhere else; a model in memory is
shared, not copied.
"""

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch

from probes.adapters.adapter import Adapter
from probes.checkpoints.checkpoint import Checkpoint
from probes.errors import InputError
from probes.files.layout import Header
from probes.files.locate import MODEL_FILES
from probes.models.body import shadow, unwrapped
from probes.text.batches import out_of_memory

Kind = Literal["causal", "classifier", "masked"]

# Any of them makes a directory one with a tokenizer.
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json",
)  # fmt: skip

AUTO: dict[Kind, str] = {
    "causal": "AutoModelForCausalLM",
    "classifier": "AutoModelForSequenceClassification",
    "masked": "AutoModelForMaskedLM",
}
# Endings of transformers' class names, and PEFT's names for tasks.
ENDINGS: dict[Kind, tuple[str, ...]] = {
    "classifier": ("ForSequenceClassification",),
    "masked": ("ForMaskedLM", "ForPreTraining"),
    "causal": ("ForCausalLM", "LMHeadModel", "LMHeadCustomModel", "ForConditionalGeneration"),
}
TASKS: dict[str, Kind] = {"SEQ_CLS": "classifier", "CAUSAL_LM": "causal"}
HEADS = "a causal language model, a masked one or a sequence classifier"
# Padding takes their first positions, which leaves fewer for tokens.
PADDED_POSITIONS = {
    "camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Runnable:
    """A model that runs.

    Attributes:
        ref: the reference that it was opened by.
        model: the torch model, in evaluation mode.
        kind: what its head predicts: the next token, masked tokens, or a class.
        context: most tokens of a sequence; None without a limit.
        labels: the names of a classifier's classes in order; () for language models.
        untrained: weights of the head that no file holds: a base has no classification head until an adapter
            brings one. They are random.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> from probes import open_model
    >>> runnable = open_model(BUNDLED / "base")
    >>> runnable.kind, runnable.context, runnable.tokenizer.decode(runnable.tokenizer("a text").input_ids)
    ('causal', 256, '<s>a text')
    """

    ref: str
    model: Any
    checkpoint: Checkpoint
    kind: Kind
    context: int | None
    labels: tuple[str, ...]
    untrained: tuple[str, ...] = ()
    trust_remote_code: bool = False

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer; raises InputError if there is none."""
        return tokenizer_of(self.checkpoint, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class Loading:
    """Where and how models are loaded."""

    device: torch.device | None
    dtype: torch.dtype | None
    device_map: Any
    trust_remote_code: bool

    def model(self, checkpoint: Checkpoint, kind: Kind) -> Runnable:
        """A checkpoint as a model."""
        untrained: tuple[str, ...] = ()
        # Weights that no file holds are random, and the same each time.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            if checkpoint.base is not None and memory_of(checkpoint) is None:
                model, untrained = self._adapted(checkpoint, kind)
            else:
                model = self._model(checkpoint, kind)
        config = unwrapped(model).config
        return Runnable(
            ref=checkpoint.ref,
            model=model.eval(),
            checkpoint=checkpoint,
            kind=kind,
            context=context_of(config),
            labels=labels_of(config) if kind == "classifier" else (),
            untrained=untrained,
            trust_remote_code=self.trust_remote_code,
        )

    def _model(self, checkpoint: Checkpoint, kind: Kind, brought: Mapping[str, Header] | None = None) -> Any:
        """A full checkpoint: from memory, or from its files without the tensors that an adapter brings."""
        memory = memory_of(checkpoint)
        if memory is None:
            return self._read(checkpoint, kind, brought or {})
        ref, stored = checkpoint.ref, next(memory.parameters())
        if self.device_map is not None:
            raise InputError(f"{ref}: lies in memory already; spread it with device_map when it is loaded")
        if self.dtype not in (None, stored.dtype):
            raise InputError(f"{ref}: lies in memory as {stored.dtype}; load it as {self.dtype}")
        # A copy that shares the weights, or a deep one where they must move.
        moves = self.device not in (None, stored.device)
        return copy.deepcopy(memory).to(self.device) if moves else shadow(memory)

    def config(self, checkpoint: Checkpoint, *, brought: Mapping[str, Header] | None = None) -> Any:
        """A checkpoint's configuration as transformers', with the classes of the head of an adapter."""
        import transformers

        # An infinity is written as an object, because JSON has no such number.
        stored = json.loads(json.dumps(dict(checkpoint.config)), object_hook=_number)
        numbers = stored.get("label2id")
        if not stored.get("id2label") and isinstance(numbers, dict) and numbers:
            # transformers would call the classes LABEL_0, LABEL_1 …
            stored["id2label"] = {number: name for name, number in numbers.items()}
        if (memory := memory_of(checkpoint)) is not None:
            return unwrapped(memory).config
        brought = brought_by(checkpoint) if brought is None else brought
        inside = (checkpoint.base or checkpoint).headers
        heads = [header.shape[0] for name, header in brought.items() if name not in inside]
        if not stored.get("model_type"):
            raise InputError(
                f"{checkpoint.ref}: no config.json says what model this is; put it beside the weights"
            )
        more = {"num_labels": min(heads)} if heads else {}
        if stored["model_type"] in transformers.CONFIG_MAPPING:
            what = f"{checkpoint.ref}: its config.json is none of a {stored['model_type']} model"
            with _silence(), _blaming(what):
                return transformers.CONFIG_MAPPING[stored["model_type"]].from_dict(stored, **more)
        if not self.trust_remote_code or "auto_map" not in stored:
            reason = "transformers does not know it; is it too old?"
            if "auto_map" in stored:
                reason = "brings code of its own, which is run only if asked for; trust it with "
                reason += "--trust-remote-code"
            raise InputError(f"{checkpoint.ref}: {stored['model_type']}: {reason}")
        return transformers.AutoConfig.from_pretrained(
            **_repository(checkpoint.base or checkpoint), trust_remote_code=True, **more
        )

    def _read(self, checkpoint: Checkpoint, kind: Kind, brought: Mapping[str, Header]) -> Any:
        import transformers

        ref = checkpoint.ref
        config = self.config(checkpoint, brought=brought)
        if config.is_encoder_decoder:
            raise InputError(f"{ref}: has an encoder and a decoder; only {HEADS} is run")
        auto = getattr(transformers, AUTO[kind])
        own_code = type(config) not in auto._model_mapping
        if own_code and not self.trust_remote_code:
            raise InputError(f"{ref}: transformers has no {kind} model for {config.model_type}")
        options = {"config": config, "device_map": self.device_map, "output_loading_info": True}
        dtype = self.dtype or "auto"
        with _silence(), _blaming(f"{ref}: does not load as a model"):
            if own_code:
                options |= _repository(checkpoint) | {"trust_remote_code": True}
                model, info = auto.from_pretrained(dtype=dtype, **options)
            elif _standard(checkpoint):
                model, info = auto.from_pretrained(checkpoint.directory, dtype=dtype, **options)
            else:
                dtype = self.dtype or getattr(torch, checkpoint.dtype)
                tensors = {name: checkpoint.tensor(name) for name in checkpoint.headers}
                classes = auto._model_mapping[type(config)]
                model_class = classes[0] if isinstance(classes, tuple) else classes
                model, info = model_class.from_pretrained(None, state_dict=tensors, dtype=dtype, **options)
        missing = sorted(set(info["missing_keys"]) - set(brought))
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise InputError(
                f"{ref}: has no {missing[0]}{more}, which a {kind} model needs; its config.json says "
                f"{checkpoint.architecture}"
            )
        return model if self.device_map is not None else model.to(self.device or "cpu")

    def _adapted(self, checkpoint: Checkpoint, kind: Kind) -> tuple[Any, tuple[str, ...]]:
        """An adapter on its base, and the weights of the base's head that are random."""
        base = checkpoint.base
        assert base is not None
        brought = brought_by(checkpoint)
        model = self._model(base, kind, brought)
        rows = [
            checkpoint.headers[matrix.tensor].shape[0]
            for matrix in base.matrices.values()
            if matrix.component == "embed" and matrix.tensor in checkpoint.headers
        ]
        if rows and rows[0] != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows[0], mean_resizing=False)
        untrained = tuple(sorted(name for name in brought if name not in base.headers))
        return inject(model, checkpoint), untrained


def kind_of(checkpoint: Checkpoint) -> Kind:
    """What a checkpoint's head predicts, by its configuration; raises InputError if it is of no such kind."""
    task = getattr(checkpoint.source, "config", {}).get("task_type") if checkpoint.base else None
    if task in TASKS:
        return TASKS[task]
    if task not in (None, "FEATURE_EXTRACTION"):
        raise InputError(f"{checkpoint.ref}: is an adapter for {task}; only {HEADS} is run")
    classes = checkpoint.config.get("architectures") or []
    for kind, endings in ENDINGS.items():
        if any(str(name).endswith(endings) for name in classes):
            return kind
    what = ", ".join(map(str, classes)) or "without a config.json that names its architecture"
    raise InputError(f"{checkpoint.ref}: is {what}; only {HEADS} is run")


def context_of(config: Any) -> int | None:
    """Most tokens of a sequence; None without a limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        length = getattr(text, name, None)
        if isinstance(length, int) and length > 0:
            return length - (text.pad_token_id + 1 if text.model_type in PADDED_POSITIONS else 0)
    return None


def labels_of(config: Any) -> tuple[str, ...]:
    """A classifier's classes in order."""
    return tuple(str(config.id2label[index]) for index in range(config.num_labels))


def tokenizer_of(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer given with a checkpoint or its base, else the one in the directory of either."""
    import transformers

    sides = [side for side in (checkpoint, checkpoint.base) if side is not None]
    if any(side.tokenizer_lost for side in sides):
        raise InputError(
            f"{checkpoint.ref}: its tokenizer was given in memory, and workers do not have it; run without "
            "--engine, or save the tokenizer in the checkpoint's directory"
        )
    in_memory = [side.tokenizer for side in sides if side.tokenizer is not None]
    if in_memory:
        return in_memory[0]
    directory = _tokenizer_directory(checkpoint)
    if directory is None:
        reason = "has no directory that could hold a tokenizer; give it as tokenizer="
        if any(side.directory is not None for side in sides):
            reason = f"no tokenizer lies beside its weights ({', '.join(TOKENIZER_FILES)}); save it there, "
            reason += "or in Python give it as tokenizer="
        raise InputError(f"{checkpoint.ref}: {reason}")
    with _blaming(f"{directory}: its tokenizer cannot be read"):
        return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether a tokenizer was given with a checkpoint or its base, or lies in the directory of either."""
    sides = [side for side in (checkpoint, checkpoint.base) if side is not None]
    if any(side.tokenizer is not None or side.tokenizer_lost for side in sides):
        return True
    return _tokenizer_directory(checkpoint) is not None


def _tokenizer_directory(checkpoint: Checkpoint) -> Path | None:
    """The directory of a checkpoint, or else of its base, that holds a tokenizer."""
    sides = [side for side in (checkpoint, checkpoint.base) if side is not None]
    directories = [side.directory for side in sides if side.directory is not None]
    return next(
        (path for path in directories if any((path / name).is_file() for name in TOKENIZER_FILES)), None
    )


def memory_of(checkpoint: Checkpoint) -> Any:
    """The model in memory that a checkpoint was opened from, of transformers or PEFT; None for files."""
    module = checkpoint.module
    if module is None:
        return None
    libraries = {kind.__module__.partition(".")[0] for kind in type(unwrapped(module)).__mro__}
    if "transformers" not in libraries or "transformer_lens" in libraries:
        raise InputError(
            f"{checkpoint.ref}: is not run; give the path that it was loaded from, a transformers model or a "
            "PeftModel"
        )
    return module


def _standard(checkpoint: Checkpoint) -> bool:
    """Whether transformers finds the same weights in the directory as we do."""
    directory, path = checkpoint.directory, Path(checkpoint.ref)
    if directory is None or (path.is_file() and path.name not in MODEL_FILES):
        return False
    return any((directory / name).is_file() for name in MODEL_FILES)


def _repository(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where the code of a checkpoint is found: its directory, or its repository on the hub."""
    if Path(checkpoint.ref).exists():
        return {"pretrained_model_name_or_path": checkpoint.directory}
    name, _, revision = checkpoint.ref.partition("@")
    return {"pretrained_model_name_or_path": name, "revision": revision or "main"}


def brought_by(checkpoint: Checkpoint) -> dict[str, Header]:
    """The tensors that an adapter replaces or adds; none for a full checkpoint."""
    if not isinstance(checkpoint.source, Adapter):
        return {}
    return {name: checkpoint.headers[name] for name in checkpoint.source.targets.replaced}


def inject(model: Any, checkpoint: Checkpoint, *, name: str = "tuned") -> Any:
    """Put an adapter from its files into its base, which changes in place."""
    import peft

    directory, device = str(checkpoint.directory), str(next(model.parameters()).device)
    what = f"{checkpoint.ref}: the adapter does not load"
    with _blaming(what), _silence(), warnings.catch_warnings():
        # Deprecations between these two libraries do not concern our users.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("error", message="Found missing adapter keys")
        if isinstance(model, peft.PeftModel):
            model.load_adapter(directory, name, torch_device=device)
            return model
        return peft.PeftModel.from_pretrained(model, directory, adapter_name=name, torch_device=device)


def _number(value: dict[str, Any]) -> Any:
    """The number that transformers writes as {"__float__": "Infinity"}; other objects are returned as is."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Raise InputError for whatever a malformed file makes a library hit; running out of memory is none."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{what} ({type(error).__name__}: {shorten(str(error), 400)})") from error


@contextmanager
def _silence() -> Iterator[None]:
    """Without transformers' progress bars and reports; our own errors name missing weights."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def device_of(device: str | torch.device | None) -> torch.device | None:
    """A device by name; "auto" is a GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return None if device is None else torch.device(device)
    except RuntimeError as error:
        raise InputError(f"{device!r} is no device; give auto, cpu or cuda:N") from error


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by name."""
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(torch_dtype, torch.dtype):
        raise InputError(f"{dtype!r} is no dtype; give float32, bfloat16 or float16")
    return torch_dtype
