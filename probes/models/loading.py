"""Loading checkpoints as torch models of transformers, with or without adapters.

Weights come from the files that `probes.checkpoints` opens and from nowhere else; a model in memory is
shared, not copied.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch

from probes.adapters.adapter import Adapter
from probes.adapters.rewriting import rewritten
from probes.adapters.targets import canonical
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.usable import in_a_line, problems, silent_transformers
from probes.errors import InputError
from probes.files.layout import Header
from probes.files.locate import MODEL_FILES
from probes.files.reparametrised import Resolved
from probes.files.untrusted import confined, plain, read_json
from probes.models.body import shadow, unwrapped
from probes.text.batches import out_of_memory

Kind = Literal["causal", "classifier", "masked"]

# Any of them makes a directory one with a tokenizer.
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json",
)  # fmt: skip

# A vision-language model is run on text alone, as its language model.
AUTO: dict[Kind, tuple[str, ...]] = {
    "causal": ("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    "classifier": ("AutoModelForSequenceClassification",),
    "masked": ("AutoModelForMaskedLM",),
}
# Endings of transformers' class names, and PEFT's names for tasks.
ENDINGS: dict[Kind, tuple[str, ...]] = {
    "classifier": ("ForSequenceClassification",),
    "masked": ("ForMaskedLM", "ForPreTraining"),
    "causal": ("ForCausalLM", "LMHeadModel", "LMHeadCustomModel", "ForConditionalGeneration"),
}
TASKS: dict[str, Kind] = {"SEQ_CLS": "classifier", "CAUSAL_LM": "causal"}
HEADS = "a causal language model, a masked one or a sequence classifier"
WHOLE = "are the files whole, and of this model? copy them again"
CONFIG = "restore the config.json that was saved with these weights"
TOKENIZER = "copy the tokenizer's files again, or save them there (`tokenizer.save_pretrained`)"
NOTHING: Mapping[str, Any] = {}
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

    def model(self, checkpoint: Checkpoint, kind: Kind, *, merged: bool = False) -> Runnable:
        """A checkpoint as a model.

        Args:
            merged: an adapter's base in the form of the merged model, with the weights of the base; a copy.
        """
        untrained: tuple[str, ...] = ()
        # Weights that no file holds are random, and the same each time.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            if checkpoint.base is not None and (merged or memory_of(checkpoint) is None):
                model, untrained = self._adapted(checkpoint, kind, merged=merged)
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
        heads = [brought[name].shape[0] for name in _new(checkpoint, brought)]
        if not stored.get("model_type"):
            raise InputError(
                f"{checkpoint.ref}: no config.json says what model this is; put it beside the weights"
            )
        more = {"num_labels": min(heads)} if heads else {}
        if stored["model_type"] in transformers.CONFIG_MAPPING:
            what = f"{checkpoint.ref}: its config.json is none of a {stored['model_type']} model"
            with silent_transformers(), _blaming(what, CONFIG, config=stored):
                return transformers.CONFIG_MAPPING[stored["model_type"]].from_dict(stored, **more)
        if not self.trust_remote_code or "auto_map" not in stored:
            reason = (
                f"transformers {transformers.__version__} does not know it; is model_type in config.json "
            )
            reason += "spelt right? a newer transformers may know it"
            if "auto_map" in stored:
                reason = "brings code of its own, which is run only if asked for; trust it with "
                reason += "--trust-remote-code"
            raise InputError(f"{checkpoint.ref}: {stored['model_type']}: {reason}")
        where = _repository(checkpoint.base or checkpoint)
        with _blaming(f"{checkpoint.ref}: the code that its config.json names does not run"):
            return transformers.AutoConfig.from_pretrained(**where, trust_remote_code=True, **more)

    def _read(self, checkpoint: Checkpoint, kind: Kind, brought: Mapping[str, Header]) -> Any:
        import transformers

        ref = checkpoint.ref
        config = self.config(checkpoint, brought=brought)
        if config.is_encoder_decoder:
            raise InputError(
                f"{ref}: has an encoder and a decoder; only {HEADS} is run (weights alone are compared and "
                "edited all the same)"
            )
        autos = [getattr(transformers, name) for name in AUTO[kind]]
        auto = next((auto for auto in autos if type(config) in auto._model_mapping), autos[0])
        stored = checkpoint.config
        own_code = type(config) not in auto._model_mapping
        if own_code and not self.trust_remote_code:
            raise InputError(f"{ref}: transformers has no {kind} model for {config.model_type}")
        options = {"config": config, "device_map": self.device_map, "output_loading_info": True}
        dtype = self.dtype or "auto"
        problem = partial(_unusable, checkpoint)
        with (
            silent_transformers(),
            _blaming(f"{ref}: does not load as a model", CONFIG, config=stored, problem=problem),
        ):
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
        if model.main_input_name != "input_ids":
            raise InputError(f"{ref}: is {checkpoint.architecture}, which runs on no text without an image")
        missing = sorted(set(info["missing_keys"]) - set(brought))
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise InputError(
                f"{ref}: has no {missing[0]}{more}, which a {kind} model needs; its config.json says "
                f"{checkpoint.architecture}: are the two of one model, and is no shard missing?"
            )
        return model if self.device_map is not None else model.to(self.device or "cpu")

    def _adapted(
        self, checkpoint: Checkpoint, kind: Kind, *, merged: bool = False
    ) -> tuple[Any, tuple[str, ...]]:
        """An adapter on its base, or its base alone, and the weights of the base's head that are random."""
        base = checkpoint.base
        assert base is not None
        brought = brought_by(checkpoint)
        memory = memory_of(checkpoint)
        if memory is not None and not hasattr(memory, "unload"):
            raise InputError(
                f"{checkpoint.ref}: transformers holds the adapter, which is not merged; give its directory, "
                "or a PeftModel"
            )
        model = self._model(base, kind, brought) if memory is None else self._model(checkpoint, kind)
        if memory is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = model.unload()
        if merged and any(memory_of(side) is not None for side in (base, checkpoint)):
            model = copy.deepcopy(model)
        rows = [
            checkpoint.headers[matrix.tensor].shape[0]
            for matrix in base.matrices.values()
            if matrix.component == "embed" and matrix.tensor in checkpoint.headers
        ]
        if rows and rows[0] != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows[0], mean_resizing=False)
        untrained = tuple(sorted(_new(checkpoint, brought)))
        if not merged:
            return inject(model, checkpoint), untrained
        if isinstance(checkpoint.source, Adapter) and checkpoint.source.targets.untied:
            untie(model)
        return model, untrained


def _new(checkpoint: Checkpoint, brought: Mapping[str, Header]) -> list[str]:
    """The tensors brought by an adapter that its base has under no name."""
    if checkpoint.base is None or not isinstance(checkpoint.source, Adapter):
        return [name for name in brought if name not in (checkpoint.base or checkpoint).headers]
    return [name for name in brought if checkpoint.source.original(name) not in checkpoint.base.headers]


def untie(model: Any) -> None:
    """Give every tied weight of a model a tensor of its own, with the same values."""
    for name in model.all_tied_weights_keys:
        path, _, leaf = name.rpartition(".")
        tensor = model.get_parameter(name)
        setattr(
            model.get_submodule(path), leaf, torch.nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
        )
    model.all_tied_weights_keys = {}
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


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
    problem = partial(_refuse_own_code, directory, trust_remote_code)
    with _blaming(f"{directory}: its tokenizer cannot be read", TOKENIZER, problem=problem):
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


def _refuse_own_code(directory: Path, trusted: bool) -> str:
    """Raise InputError if a tokenizer was not read because its code is not trusted; else nothing is known."""
    settings = {}
    with suppress(InputError):  # what cannot be read is the problem itself
        settings = read_json(confined(directory / "tokenizer_config.json", directory))
    if "auto_map" in settings and not trusted:
        raise InputError(
            f"{directory}: its tokenizer brings code of its own, which is run only if asked for; trust it "
            "with --trust-remote-code"
        )
    return ""


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
    if isinstance(checkpoint.source, Resolved):  # transformers would take the weights for missing
        return False
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

    adapter, device = checkpoint.source, str(next(model.parameters()).device)
    assert isinstance(adapter, Adapter)
    assert checkpoint.directory is not None
    # PEFT ignores fields that it does not know; here they were all read or found to be harmless.
    lora_fields = peft.LoraConfig.__dataclass_fields__
    fields = {field: value for field, value in adapter.config.items() if field in lora_fields}
    transposed = any(getattr(module, "is_transposed", False) for module in model.modules())
    what = f"{checkpoint.ref}: the adapter does not load"
    with ExitStack() as stack:
        stack.enter_context(_blaming(what))
        stack.enter_context(silent_transformers())
        stack.enter_context(warnings.catch_warnings())
        # What PEFT remarks on was read and found to be right, or is refused.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        config = peft.LoraConfig(**fields | {"inference_mode": True})
        files = rewritten(adapter, checkpoint.directory, peft.__version__, transposed)
        directory = str(stack.enter_context(files))
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
            model.load_adapter(directory, name, torch_device=device)
        else:
            model = peft.PeftModel.from_pretrained(
                model, directory, adapter_name=name, config=config, torch_device=device
            )
    _refuse_ignored(model, checkpoint, name)
    return model


def _refuse_ignored(model: Any, checkpoint: Checkpoint, name: str) -> None:
    """Raise InputError if PEFT took no notice of factors in the file: the config does not target them.

    Those of experts are counted otherwise in the file than in memory.
    """
    assert isinstance(checkpoint.source, Adapter)

    def factors(keys: Iterable[str]) -> set[str]:
        return {canonical(key) for key in keys if ".lora_" in key and ".experts." not in key}

    stored = factors(checkpoint.source.weights.headers)
    loaded = factors(key for key in model.state_dict() if f".{name}." in key or key.endswith(f".{name}"))
    if len(stored) > len(loaded):
        module = min(stored - loaded).removeprefix("base_model.model.").partition(".lora_")[0]
        raise InputError(
            f"{checkpoint.ref}: holds factors of {module}, which its adapter_config.json does not target, so "
            "that PEFT does not load them; add the module to target_modules, or remove its tensors"
        )


def _unusable(checkpoint: Checkpoint) -> str:
    """What is wrong with the weights under their config.json, as far as that can be told."""
    return in_a_line([problem for problem in problems(checkpoint) if problem.tensor is not None])


def _number(value: dict[str, Any]) -> Any:
    """The number that transformers writes as {"__float__": "Infinity"}; other objects are returned as is."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


@contextmanager
def _blaming(
    what: str, remedy: str = WHOLE, *, config: Mapping[str, Any] = NOTHING, problem: Callable[[], str] = str
) -> Iterator[None]:
    """Raise InputError for whatever a malformed file makes a library hit; running out of memory is none.

    Args:
        what: what cannot be done.
        remedy: what mends it.
        config: in which the fields are looked for whose values the library does not know.
        problem: says in our own words what is wrong, "" if it does not know; or raises an InputError.
    """
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = problem() or _reason(error, config)
        raise InputError(plain(f"{what} ({reason}); {remedy}")) from error


def _reason(error: BaseException, config: Mapping[str, Any]) -> str:
    """What a library says of a malformed file, and of which field."""
    while error.__cause__ is not None:  # a validator's own words, without those of its callers
        error = error.__cause__
    text = shorten(str(error.args[0] if isinstance(error, KeyError) and error.args else error), 300)
    if not isinstance(error, KeyError):
        return text or type(error).__name__
    parts = {"": config, **{f"{name}.": part for name, part in config.items() if isinstance(part, Mapping)}}
    fields = [f"{path}{name}" for path, part in parts.items() for name in part if part[name] == text]
    if fields:
        return f"{fields[0]} is {text!r}, which is not known"
    return text if " " in text else f"it lacks {text!r}"


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
