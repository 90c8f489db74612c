"""Pairs with one planted fault each, over architectures and dtypes: merged adapters, as users save them.

An intact pair is a base, an adapter on it, and PEFT's own merge of the two, with a tokenizer whose chat
template ends a turn with the token at which generation stops.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

WORDS = ["<unk>", "<pad>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", *(f"w{i}" for i in range(58))]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.05, "pad_token_id": 1,
    "bos_token_id": None, "eos_token_id": 3,
}  # fmt: skip
# architecture -> config class, its settings, modules that the adapter is on
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaConfig", SIZES, ["q_proj", "v_proj", "down_proj"]),
    "qwen2-tied": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}, ["q_proj", "gate_proj"]),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 64, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "pad_token_id": 1,
            "bos_token_id": None, "eos_token_id": 3, "initializer_range": 0.05,
        },
        ["c_attn", "c_fc"],
    ),
    "gpt-neox": ("GPTNeoXConfig", SIZES, ["query_key_value", "dense_4h_to_h"]),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tokenizer() -> Any:
    """A tokenizer of whole words with a chat template."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<|end|>",
        additional_special_tokens=["</s>", "<|user|>", "<|assistant|>"],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def intact(out: Path, architecture: str, dtype: str, *, seed: int = 0) -> Path:
    """A directory with `base`, `adapter`, `other` (another adapter) and `tuned`, which is the merge."""
    name, settings, modules = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**settings)
    base = transformers.AutoModelForCausalLM.from_config(config).to(DTYPES[dtype])
    words = tokenizer()
    save(base, words, out / "base")
    for adapter in ("other", "adapter"):
        model = transformers.AutoModelForCausalLM.from_pretrained(out / "base", dtype=DTYPES[dtype])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lora = peft.LoraConfig(
                r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM",
                fan_in_fan_out=architecture == "gpt2",
            )  # fmt: skip
            tuned = peft.get_peft_model(model, lora)
        with torch.no_grad():
            for parameter_name, parameter in tuned.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.02)
        tuned.save_pretrained(out / adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(tuned.merge_and_unload(), words, out / "tuned")
    return out


def save(model: Any, words: Any, out: Path) -> None:
    model.generation_config.eos_token_id = 3
    model.save_pretrained(out)
    words.save_pretrained(out)


# --- faults: each changes `tuned` of a copied pair ---


def weights(edit: Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], None]) -> Any:
    """A fault of tuned's weights, given those of base."""

    def plant(pair: Path) -> None:
        base = load_file(pair / "base" / "model.safetensors")
        tuned = load_file(pair / "tuned" / "model.safetensors")
        edit(base, tuned)
        save_file(tuned, pair / "tuned" / "model.safetensors", {"format": "pt"})

    return plant


def scaled(factor: float, only: str = "") -> Any:
    """The delta of all layers, or those whose names hold a text, times a factor."""

    def edit(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> None:
        adapted = [name for name in base if not torch.equal(base[name], tuned[name])]
        chosen = [name for name in adapted if only in name]
        assert chosen
        for name in chosen:
            delta = tuned[name].double() - base[name].double()
            tuned[name] = (base[name].double() + factor * delta).to(base[name].dtype)

    return weights(edit)


def merged_with(scale: float, adapter: str = "adapter") -> Any:
    """PEFT's merge of an adapter whose scaling, or which itself, is another."""

    def plant(pair: Path) -> None:
        base = transformers.AutoModelForCausalLM.from_pretrained(pair / "base", dtype="auto")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(base, pair / adapter)
            for module in model.modules():
                if isinstance(getattr(module, "scaling", None), dict):
                    module.scaling = {name: value * scale for name, value in module.scaling.items()}
            save(model.merge_and_unload(), tokenizer(), pair / "tuned")

    return plant


def nan_head(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> None:
    head = next(
        name for name in tuned if any(word in name for word in ("lm_head", "embed_out", "embed", "wte"))
    )
    tuned[head] = torch.full_like(tuned[head], float("nan"))


def no_op(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> None:
    tuned.update(base)


def swapped_eos(pair: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        path = pair / "tuned" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))


def edited_template(pair: Path) -> None:
    path = pair / "tuned" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|end|>", "<|end|> </s>"))


# fault -> how it is planted, and the metric that must report it
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "one layer unmerged": (scaled(0, ".1."), "unmerged"),
    "all unmerged": (weights(no_op), "unmerged"),
    "no-op": (weights(no_op), "nothing_tuned"),
    "x0.5": (merged_with(0.5), "scaled"),
    "x1.02": (merged_with(1.02), "scaled"),
    "x2": (merged_with(2.0), "scaled"),
    "another adapter": (merged_with(1.0, "other"), "other_delta"),
    "swapped EOS": (swapped_eos, "lost_stops"),
    "edited template": (edited_template, "template_changed"),
    "NaN head": (weights(nan_head), "nonfinite_tuned"),
}


def planted(pair: Path, fault: str, out: Path) -> Path:
    """A copy of an intact pair with one fault in it."""
    shutil.copytree(pair, out)
    FAULTS[fault][0](out)
    return out
