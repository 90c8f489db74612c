"""Fields of adapter_config.json: those that are read, those that change no weight, and what is refused.

The fields are those of LoraConfig in PEFT 0.2 to 0.21, and those that other trainers add.
"""

from collections.abc import Mapping
from typing import Any

from probes.errors import InputError

# Adapters that add a prompt or activations and change no weight.
WEIGHTLESS = {
    "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT",
    "CARTRIDGE",
}  # fmt: skip
# What they add depends on the input: no weights compute the same.
ROUTED = {"XLORA", "POLY", "SHADOW", "LILY"}
# Fields of LoraConfig that give the factors another meaning, and whether PEFT can merge them.
VARIANTS = {
    "layer_replication": ("it repeats layers of its base", False),
    "arrow_config": ("it routes between adapters", False),
    "alora_invocation_tokens": ("it is an aLoRA, switched on by tokens", False),
    "use_qalora": ("it is a QA-LoRA", True),
    "use_bdlora": ("it is a BD-LoRA", True),
    "kasa_config": ("it is a KaSA, which cuts the smallest singular values of its base", True),
    "monteclora_config": ("it is a MonteCLoRA", True),
    "megatron_config": ("it is for Megatron's own layers", True),
    "enable_lora": ("PEFT before 0.3 adapted parts of fused layers in this way", True),
}
# Initialisations that also change the base's weights: the factors are then no delta to the base on disk.
MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
MERGE = "merge it where it was trained (`model.merge_and_unload().save_pretrained(DIR)`) and give DIR"
READ = frozenset({
    "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha",
    "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias", "modules_to_save",
    "target_parameters", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights",
    "auto_mapping", "lora_B_layout", "unsloth_fused_expert_lora",
})  # fmt: skip
# Which modules are adapted, which the names of the factors tell, and how they were trained.
HARMLESS = frozenset({
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "inference_mode", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "merge_weights",
    # of ms-swift
    "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
    "_name_or_path", "_commit_hash", "transformers_version", "unsloth_version", "unsloth_fixed",
})  # fmt: skip


def refuse(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for an adapter that is not read, naming the field that says so, and what to do."""
    kind = str(config.get("peft_type", "unknown")).upper()
    if kind in WEIGHTLESS:
        raise InputError(f"{where}: a {kind} adapter changes no weights, so there is nothing to compare")
    if kind in ROUTED:
        reason = "what it adds depends on the input, and no weights compute the same: it cannot be compared"
        raise InputError(f"{where}: adapter of type {kind}; {reason}")
    if kind != "LORA":
        read = "LoRA, rsLoRA and DoRA are read as they are"
        raise InputError(f"{where}: adapter of type {kind}; {read}: {MERGE}")
    for name, (meaning, mergeable) in VARIANTS.items():
        if config.get(name):
            remedy = MERGE if mergeable else "no weights compute the same, so that it cannot be compared"
            raise InputError(f"{where}: {name} is set ({meaning}); {remedy}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVED_BASE):
        raise InputError(
            f"{where}: init_lora_weights={start!r} also changed the base's weights in training; save it "
            f"again with `path_initial_model_for_weight_conversion`, or {MERGE}"
        )
    for name, value in config.items():
        if value and name not in READ | HARMLESS:
            raise InputError(
                f"{where}: adapter_config.json has `{str(name)[:80]}`, which this version does not know; "
                f"{MERGE}, or update tunescope"
            )
