"""What lies where weights were looked for, and how its own framework makes readable weights of it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from probes.files.untrusted import plain

# Names in a message.
SHOWN = 3


@dataclass(frozen=True)
class Format:
    """Files that hold a model and are not read.

    Attributes:
        patterns: globs within the directory.
        what: the files.
        remedy: what to do; {directory} and {file} stand for the path and the first match.
    """

    patterns: tuple[str, ...]
    what: str
    remedy: str


# Directories within a checkpoint.
PART = re.compile(r"global_step\d|pytorch_model_fsdp_\d|mp_rank_\d")
THERE = "put config.json and the tokenizer there and give OUT"
LOADED = "AutoModelForCausalLM.from_pretrained"
# The traces of a framework come before files that several of them write.
FORMATS = (
    Format(
        ("zero_to_fp32.py", "global_step*", "*zero_pp_rank_*", "*/*zero_pp_rank_*",
         "*mp_rank_*_model_states.pt", "*/*mp_rank_*_model_states.pt"),
        "the shards of DeepSpeed's ZeRO",
        f"gather them with `python {{directory}}/zero_to_fp32.py {{directory}} OUT`, {THERE}",
    ),
    Format(
        ("pytorch_model_fsdp_*/*.distcp", "pytorch_model_fsdp_*/.metadata"),
        "the shards of FSDP",
        f"merge them with `accelerate merge-weights {{directory}}/{{file}} OUT`, {THERE}",
    ),
    Format(
        ("latest_checkpointed_iteration.txt", "iter_*/mp_rank_*", "iter_*/common.pt", "mp_rank_*",
         "model_optim_rng.pt", "common.pt", "weights/common.pt", "*.nemo"),
        "a checkpoint of Megatron or NeMo",
        "export it to Hugging Face's format with Megatron Bridge (`AutoBridge.export_ckpt`) or with "
        "tools/checkpoint/convert.py of Megatron-LM, and give that",
    ),
    Format(
        ("*.distcp", "*/*.distcp", ".metadata"),
        "the shards of torch.distributed.checkpoint",
        "merge them with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {shards} OUT.pt`, "
        "put config.json and the tokenizer beside OUT.pt and give that",
    ),
    Format(
        ("shard-*-model-*-of-*.safetensors",),
        "the shards of transformers' distributed saving",
        f"gather them with `{LOADED}('{{directory}}').save_pretrained('OUT')` and give OUT",
    ),
    Format(
        ("pytorch_model_fsdp*.bin",),
        "the weights of FSDP in one file",
        "rename it to pytorch_model.bin, which transformers reads",
    ),
    Format(
        ("*.gguf",),
        "a model for llama.cpp",
        "give the checkpoint that it was made from, or convert it with "
        f"`{LOADED}('{{directory}}', gguf_file='{{file}}').save_pretrained('OUT')` and give OUT",
    ),
    Format(
        ("tf_model*.h5", "*.ckpt.index", "flax_model*.msgpack"),
        "weights of TensorFlow or Flax",
        f"convert them where transformers is below 5, `{LOADED}('{{directory}}', from_tf=True)"
        ".save_pretrained('OUT')` (or from_flax=True), and give OUT",
    ),
    Format(
        ("*.onnx", "openvino_model.*", "*.mlmodel", "*.mlpackage", "*.tflite"),
        "a model exported for inference",
        "give the checkpoint that it was exported from",
    ),
)  # fmt: skip


def explained(path: Path) -> str | None:
    """What a file or a directory without readable weights holds, and what to do; None if nothing is known.

    >>> import pathlib, tempfile
    >>> run = pathlib.Path(tempfile.mkdtemp()); (run / "tiny.gguf").touch()
    >>> explained(run).partition(";")[0]
    'holds a model for llama.cpp (tiny.gguf)'
    """
    if path.is_file():
        forms = [form for form in FORMATS if any(map(path.match, form.patterns))]
        return _text(forms[0], path.parent, [path]) if forms else None
    if PART.match(path.name) and (reason := explained(path.parent)):
        return reason
    for form in FORMATS:
        globs = [islice(_glob(path, pattern), SHOWN + 1) for pattern in form.patterns]
        if matches := sorted({match for matches in globs for match in matches}):
            return _text(form, path, matches)
    return _in_subdirectories(path)


def _glob(path: Path, pattern: str) -> Iterator[Path]:
    """The matches in a directory; a link to another directory is not entered, as it may lead outside."""
    first, _, rest = pattern.partition("/")
    if not rest:
        yield from path.glob(first)
        return
    for directory in path.glob(first):
        if directory.is_dir() and not directory.is_symlink():
            yield from _glob(directory, rest)


def _text(form: Format, directory: Path, matches: list[Path]) -> str:
    names = list(dict.fromkeys(match.relative_to(directory).parts[0] for match in matches))
    listed = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    remedy = form.remedy.format(directory=directory, file=names[0], shards=matches[-1].parent)
    return plain(f"holds {form.what} ({listed}); {remedy}")


def _in_subdirectories(path: Path) -> str | None:
    """Adapters or models one level deeper."""
    kinds = {"adapters": "adapter_config.json", "models": "config.json"}
    for what, file in kinds.items():
        names = sorted(config.parent.name for config in islice(_glob(path, f"*/{file}"), 100))
        if names:
            listed = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
            return plain(f"holds {what} in directories of their own ({listed}); name one, {path / names[0]}")
    return None
