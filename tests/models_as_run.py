"""Pairs of twelve architectures in six variants, and the logits that transformers and PEFT give for each.

`python -m tests.models_as_run` prints the table of `models_as_run.md`.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from diagnostics.edits.graft import graft
from diagnostics.edits.interpolate import interpolate
from diagnostics.edits.mitigate import mitigate
from probes import CheckpointPair
from probes.checkpoints.mask_file import Patch
from probes.errors import InputError
from probes.models.interpolated import InterpolatedModel
from probes.models.two_sided import TwoSidedModel
from tests.probes.runnable import FAMILIES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TABLE = Path(__file__).with_suffix(".md")
VOCABULARY = 48
IDS = torch.tensor([[5, 9, 3, 30, 7, 41]])
# Of the largest logit. Merging an adapter, or folding a stack of experts, adds the same products in another
# order: about 1e-6 in two layers of 32. Another model is off by a hundred times as much at least.
ROUND_OFF = 2e-5

HEADING = """# Two models, each exactly as its user runs it

Logits at both ends of `path`, and of what `interpolate` (0, 1), `graft` (all, none, all `--without`) and
`mitigate --scale 1` write, against what transformers, or PEFT for an adapter unmerged, computes of the same
files. `=`: equal within float32 round-off. `no`: refused, for the reason below. `python -m
tests.models_as_run` writes this page and the largest differences."""

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = TOKENS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32,
}  # fmt: skip
ENCODER = TOKENS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
VISION_AND_TEXT = TOKENS | {
    "text_config": DECODER
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
    "image_token_id": 44, "video_token_id": 45, "vision_start_token_id": 46, "vision_end_token_id": 47,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A tiny model of an architecture.

    Attributes:
        model: its class in transformers; `auto` loads it.
        targets, parameters: what the adapter is on, as modules and as stacks of experts.
        head: the module that the adapter on the head is on.
        namings: further names that transformers loads the same file under, as substitutions.
        task: PEFT's name of what it is for.
    """

    model: str
    config: dict[str, Any]
    targets: tuple[str, ...] = ("q_proj", "down_proj")
    head: str = "lm_head"
    auto: str = "AutoModelForCausalLM"
    parameters: tuple[str, ...] = ()
    namings: tuple[dict[str, str], ...] = ()
    task: str | None = "CAUSAL_LM"

    @cached_property
    def model_class(self) -> Any:
        return getattr(transformers, self.model)

    @cached_property
    def names(self) -> tuple[dict[str, str], ...]:
        """Every naming: as saved, without the prefix of the body, inside another module, and `namings`."""
        prefix = self.model_class.base_model_prefix
        return {}, {rf"^{prefix}\.": ""}, {"^": f"{prefix}."}, *self.namings


ARCHITECTURES = {
    "Llama": Architecture("LlamaForCausalLM", DECODER),
    "GPT-2": Architecture(
        "GPT2LMHeadModel",
        TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 48},
        ("c_attn", "mlp.c_proj"),
    ),
    "GPT-NeoX": Architecture(
        "GPTNeoXForCausalLM", ENCODER, ("query_key_value", "dense_h_to_4h"),
        namings=({r"^lm_head\.": "embed_out."},),
    ),
    "Qwen2": Architecture("Qwen2ForCausalLM", DECODER),
    "Qwen2-VL": Architecture(
        "Qwen2VLForConditionalGeneration", VISION_AND_TEXT, auto="AutoModelForImageTextToText",
        namings=({r"^model\.": "model.language_model.", r"^visual\.": "model.visual."},),
    ),
    "Gemma": Architecture("GemmaForCausalLM", DECODER),
    "Phi-3": Architecture("Phi3ForCausalLM", DECODER, ("qkv_proj", "gate_up_proj")),
    "OLMoE": Architecture(
        "OlmoeForCausalLM", DECODER | {"num_experts": 4, "num_experts_per_tok": 2}, ("q_proj",),
        parameters=("mlp.experts.down_proj",),
    ),
    "Mixtral": Architecture(
        "MixtralForCausalLM", DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}, ("q_proj",),
        parameters=("mlp.experts.gate_up_proj",),
    ),
    "Mamba": Architecture(
        "MambaForCausalLM", TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        ("in_proj", "x_proj"),
    ),
    "T5": Architecture(
        "T5ForConditionalGeneration",
        TOKENS | {
            "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        ("q", "wo"), auto="AutoModelForSeq2SeqLM", task=None,
    ),
    "BERT": Architecture(
        "BertForMaskedLM", ENCODER, ("query", "output.dense"), head="cls.predictions.decoder",
        auto="AutoModelForMaskedLM", task=None,
        namings=({r"LayerNorm\.weight": "LayerNorm.gamma", r"LayerNorm\.bias": "LayerNorm.beta"},),
    ),
}  # fmt: skip


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP, SIGLIP = (
    SIZES | {"image_size": 8, "patch_size": 4, "model_type": f"{name}_vision_model"}
    for name in ("clip", "siglip")
)
LONGER = {"vocab_size": VOCABULARY}


def _seeing(model: str, vision: dict[str, Any], text: dict[str, Any], **more: Any) -> Architecture:
    parts = {"vision_config": vision, "text_config": DECODER | text, "image_token_id": 44}
    return Architecture(model, TOKENS | parts | more, auto="AutoModelForImageTextToText")


def _masked(family: str, head: str, targets: tuple[str, ...]) -> Architecture:
    model, config = FAMILIES[family]
    return Architecture(model, config | LONGER, targets, head, auto="AutoModelForMaskedLM", task=None)


def _causal(family: str, *targets: str) -> Architecture:
    model, config = FAMILIES[family]
    return Architecture(model, config | LONGER, targets or ("q_proj", "down_proj"))


# Not in the table: the rest of what was tried.
FURTHER = {
    "OPT": _causal("opt", "q_proj", "fc1"),
    "BLOOM": _causal("bloom", "query_key_value", "dense_h_to_4h"),
    "Gemma 2": _causal("gemma2"),
    "GPT": _causal("openai-gpt", "c_attn", "c_fc"),
    "GPT-OSS": _causal("gpt_oss", "q_proj"),
    "DeepSeek-V3": _causal("deepseek_v3", "o_proj"),
    "Mamba 2": _causal("mamba2", "in_proj"),
    "RoBERTa": _masked("roberta", "lm_head.decoder", ("query", "output.dense")),
    "ALBERT": _masked("albert", "predictions.decoder", ("query", "ffn")),
    "LLaVA": _seeing("LlavaForConditionalGeneration", CLIP, {"model_type": "llama"}),
    "Gemma 3": _seeing(
        "Gemma3ForConditionalGeneration", SIGLIP, {"model_type": "gemma3_text"}, mm_tokens_per_image=4
    ),
    "PaliGemma": _seeing(
        "PaliGemmaForConditionalGeneration", SIGLIP | {"projection_dim": 32, "vision_use_head": False},
        {"model_type": "gemma"}, projection_dim=32,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A pair on the disk, and the logits of each side as its user has them, in float32."""

    base: Path
    tuned: Path
    base_logits: torch.Tensor
    tuned_logits: torch.Tensor


class Cases:
    """Makes the pairs of an architecture in a directory; each model is made once."""

    def __init__(self, name: str, root: Path):
        self.architecture, self.root = (ARCHITECTURES | FURTHER)[name], root

    def base(self, *, tied: bool) -> Path:
        """A saved base, every parameter random, so that nothing agrees by being zero."""
        path = self.root / f"base-tied-{tied}"
        if not path.exists():
            model_class = self.architecture.model_class
            config = self.architecture.config | {"tie_word_embeddings": tied}
            model = model_class(model_class.config_class(**config)).eval()
            _randomise(model, seed=0, scale=0.25, kept=0.0)
            model.save_pretrained(path)
        return path

    def tuned(self, *, tied: bool, dtype: torch.dtype = torch.float32) -> Path:
        """The base with every parameter moved a little."""
        path = self.root / f"tuned-tied-{tied}-{dtype}"
        if not path.exists():
            model = self.load(self.base(tied=tied))
            _randomise(model, seed=1, scale=0.05, kept=1.0)
            model.to(dtype).save_pretrained(path)
        return path

    def load(self, path: Path, dtype: Any = torch.float32) -> Any:
        """A model as transformers alone loads it; an adapter as PEFT puts it on the base beside it."""
        return getattr(transformers, self.architecture.auto).from_pretrained(path, dtype=dtype).eval()

    def full(self, base: Path, tuned: Path) -> Case:
        return Case(base, tuned, logits(self.load(base)), logits(self.load(tuned)))

    def renamed(self, path: Path, naming: int) -> Path:
        """A copy of a saved model with its tensors under other names."""
        target = path.with_name(f"{path.name}-{naming}")
        if not target.exists():
            target.mkdir()
            (target / "config.json").write_bytes((path / "config.json").read_bytes())
            tensors = {}
            for name, tensor in load_file(path / "model.safetensors").items():
                for old, new in self.architecture.names[naming].items():
                    if re.search(old, name):
                        name = re.sub(old, new, name)
                        break
                tensors[name] = tensor
            save_file(tensors, target / "model.safetensors", {"format": "pt"})
        return target

    def names(self) -> Iterator[Case]:
        """Pairs of two namings that transformers loads as one."""
        usable = []
        for naming in range(len(self.architecture.names)):
            path = self.renamed(self.base(tied=False), naming)
            if torch.equal(logits(self.load(path)), logits(self.load(self.base(tied=False)))):
                usable.append(naming)
        assert usable[1:], "transformers loads it under one naming only"
        for tied, ours, theirs in zip(
            (True, False) * len(usable), usable, [*usable[1:], usable[0]], strict=False
        ):
            yield self.full(
                self.renamed(self.base(tied=tied), ours), self.renamed(self.tuned(tied=tied), theirs)
            )

    def adapter(self, out: str, *, tied: bool, **config: Any) -> Case:
        """An adapter as PEFT trains and saves it; its logits are those of the PeftModel, unmerged."""
        settings = {"r": 4, "lora_alpha": 8, "target_modules": list(self.architecture.targets)} | config
        settings["task_type"] = self.architecture.task
        tuned, base_model = self.root / out, self.load(self.base(tied=tied))
        base_logits = logits(base_model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(base_model, peft.LoraConfig(**settings))
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            model.save_pretrained(tuned)
        return Case(self.base(tied=tied), tuned, base_logits, logits(model.eval()))

    def adapters(self) -> Iterator[Case]:
        for tied in (True, False):
            parameters = list(self.architecture.parameters) or None
            yield self.adapter(f"adapter-tied-{tied}", tied=tied, target_parameters=parameters)

    def heads(self) -> Iterator[Case]:
        """Adapters with factors on the head, or with a head of their own, on a tied and an untied base."""
        head = self.architecture.head
        for tied in (True, False):
            on_head = {"target_modules": [*self.architecture.targets, head]}
            yield self.adapter(f"on-head-tied-{tied}", tied=tied, **on_head)
            yield self.adapter(f"own-head-tied-{tied}", tied=tied, modules_to_save=[head])


VARIANTS: dict[str, Callable[[Cases], Iterator[Case]]] = {
    "tied": lambda cases: iter([cases.full(cases.base(tied=True), cases.tuned(tied=True))]),
    "untied": lambda cases: iter([cases.full(cases.base(tied=False), cases.tuned(tied=False))]),
    "renamed prefix": Cases.names,
    "bf16 on fp32": lambda cases: iter(
        [cases.full(cases.base(tied=True), cases.tuned(tied=True, dtype=torch.bfloat16))]
    ),
    "adapter": Cases.adapters,
    "adapter on the head": Cases.heads,
}


def logits(model: Any) -> torch.Tensor:
    """Logits of one row."""
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **decoder).logits


Outcomes = dict[str, float | str]


def outcomes(cases: Cases, case: Case, out: Path, *, every: bool = True) -> Outcomes:
    """What each operation gives: how far its logits are from the right ones, or why it is refused.

    Differences are shares of the largest logit.

    Args:
        every: graft and mitigate too.
    """
    out.mkdir(parents=True)
    base, tuned = case.base_logits, case.tuned_logits
    scale = float(max(base.abs().max(), tuned.abs().max()))
    assert float((base - tuned).abs().max()) > 100 * ROUND_OFF * scale, "nothing was tuned"

    def written(directory: Path) -> torch.Tensor:
        """Logits of a directory in float32, loaded so or in the dtype that its configuration names."""
        if (directory / "adapter_config.json").exists():
            return logits(peft.PeftModel.from_pretrained(cases.load(case.base), directory).eval())
        chosen = cases.load(directory, "auto")
        stored = load_file(directory / "model.safetensors").values()
        rounded = chosen.dtype.itemsize < max(tensor.itemsize for tensor in stored)
        return logits(chosen.float() if rounded else cases.load(directory))

    def at(alpha: float) -> torch.Tensor:
        with TwoSidedModel(CheckpointPair(case.base, case.tuned), dtype="float32") as two_sided:
            interpolated = InterpolatedModel(two_sided)
            interpolated.set_alpha(0.5)
            interpolated.set_alpha(alpha)
            return logits(interpolated.model)

    def interpolated(alpha: float) -> torch.Tensor:
        return written(interpolate(case.base, case.tuned, alpha, out / f"alpha-{alpha}").out)

    def grafted(*, full: bool, without: bool = False) -> torch.Tensor:
        pair = CheckpointPair(case.base, case.tuned)
        headers = pair.tuned.headers.items() if full else ()
        mask = {
            key: torch.arange(header.entries) for key, header in headers if header.dtype.is_floating_point
        }
        directory = out / f"graft-{full}-{without}"
        Patch.of(pair, mask).save(f"{directory}.safetensors")
        return written(
            graft(case.base, case.tuned, f"{directory}.safetensors", directory, without=without).out
        )

    def mitigated(full: bool | None = None) -> torch.Tensor:
        return written(mitigate(case.base, case.tuned, out / f"mitigated-{full}", scale=1.0, full=full).out)

    operations: dict[str, tuple[torch.Tensor, Callable[[], torch.Tensor]]] = {
        "path 0": (base, lambda: at(0.0)),
        "path 1": (tuned, lambda: at(1.0)),
        "interpolate 0": (base, lambda: interpolated(0.0)),
        "interpolate 1": (tuned, lambda: interpolated(1.0)),
    }
    more: dict[str, tuple[torch.Tensor, Callable[[], torch.Tensor]]] = {
        "graft all": (tuned, lambda: grafted(full=True)),
        "graft none": (base, lambda: grafted(full=False)),
        "graft without": (base, lambda: grafted(full=True, without=True)),
        "mitigate": (tuned, mitigated),
    }
    if (case.tuned / "adapter_config.json").exists():
        more["mitigate full"] = tuned, lambda: mitigated(full=True)
    operations |= more if every else {}
    results: Outcomes = {}
    for operation, (expected, run) in operations.items():
        try:
            results[operation] = float((run() - expected).abs().max()) / scale
        except InputError as error:
            results[operation] = re.sub(rf"{re.escape(str(cases.root))}/[\w.-]+", "DIR", str(error))
    return results


def cell(cases: Cases, variant: str, out: Path) -> Outcomes:
    """The outcomes of all pairs of a cell, the first in full: the largest differences, and the refusals."""
    worst: Outcomes = {}
    for number, case in enumerate(VARIANTS[variant](cases)):
        for operation, value in outcomes(cases, case, out / str(number), every=not number).items():
            before = worst.get(operation, 0.0)
            both_right = isinstance(value, float) and isinstance(before, float)
            worst[operation] = (
                max(value, before) if both_right else (before if isinstance(before, str) else value)
            )
    return worst


def summary(results: Outcomes) -> str:
    """`=` if what is not refused is right; then what is wrong, by how much, and what is refused, and why."""
    wrong = {k: value for k, value in results.items() if isinstance(value, float) and not value <= ROUND_OFF}
    refused: dict[str, list[str]] = {}
    for name, value in results.items():
        if isinstance(value, str):
            refused.setdefault(value, []).append(name)
    parts = [f"{name} {value:.1e} off" for name, value in wrong.items()]
    if not wrong and sum(map(len, refused.values())) < len(results):
        parts = ["="]
    return " · ".join([*parts, *(f"no {', '.join(names)}: {reason}" for reason, names in refused.items())])


def table(cells: dict[tuple[str, str], str]) -> str:
    """Cells as markdown, each reason of a refusal once, below it."""
    reasons: list[str] = []

    def short(part: str) -> str:
        what, colon, reason = part.partition(": ")
        if colon and reason not in reasons:
            reasons.append(reason)
        return f"{what} [{reasons.index(reason) + 1}]" if colon else part

    lines = [*HEADING.splitlines(), "", "| | " + " | ".join(VARIANTS) + " |"]
    lines.append("| --- " * (len(VARIANTS) + 1) + "|")
    for name in ARCHITECTURES:
        row = [" · ".join(map(short, cells.get((name, variant), "").split(" · "))) for variant in VARIANTS]
        lines.append(f"| {' | '.join([name, *row])} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))])


def committed() -> dict[tuple[str, str], str]:
    """The cells of the table in `models_as_run.md`, with the reasons in them."""
    text = TABLE.read_text(encoding="utf-8")
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    cells = {}
    for line in text.splitlines():
        name, *row = line.strip("| ").split(" | ")
        if name in ARCHITECTURES:
            for variant, value in zip(VARIANTS, row, strict=True):
                cells[name, variant] = re.sub(r" \[(\d+)\]", lambda match: f": {reasons[match[1]]}", value)
    return cells


def _randomise(model: Any, *, seed: int, scale: float, kept: float) -> None:
    """Every parameter times `kept`, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(kept * parameter + scale * torch.randn(parameter.shape, generator=generator))


def main() -> None:
    cells = {}
    for name in sys.argv[1:] or ARCHITECTURES:
        for variant in VARIANTS:
            with TemporaryDirectory() as root:
                results = cell(Cases(name, Path(root)), variant, Path(root) / "out")
            cells[name, variant] = summary(results)
            largest = max((value for value in results.values() if isinstance(value, float)), default=0.0)
            print(f"{name}, {variant}: {largest:.1e} {cells[name, variant]}", file=sys.stderr, flush=True)
    print(table(cells))


if __name__ == "__main__":
    main()
