"""Quantised weights are refused by name: stored codes are not weights, and their spectrum means nothing."""

from collections.abc import Mapping
from typing import Any

import torch

from probes.layout import Header

# Endings of stored names, most telling first, and the scheme that writes them.
_MARKS = {
    ".g_idx": "GPTQ",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes 4-bit (nf4)",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes 4-bit (fp4)",
    ".absmax": "bitsandbytes 4-bit",
    ".quant_map": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    "_blocks": "MXFP4",
    ".weight_packed": "compressed-tensors",
    ".q_weight": "EXL2",
    ".W_q": "HQQ",
    ".weight_scale_inv": "fp8 with block scales",
    ".weight_scale": "fp8 or int8 with scales",
}
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_TORCH_CODES = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)

# How to come back to plain weights, by a word of the scheme's name.
_BACK = {
    "without scales": "nothing in the file says what its numbers stand for; get the unquantised checkpoint",
    "bitsandbytes": "load it with transformers, then `model.dequantize().save_pretrained(DIR)`",
    "mxfp4": "load it by transformers with `Mxfp4Config(dequantize=True)`, then `save_pretrained(DIR)`",
    "fp8": "load it by transformers with `FineGrainedFP8Config(dequantize=True)`, `save_pretrained(DIR)`",
    "compressed-tensors": "load it by transformers with `CompressedTensorsConfig(dequantize=True)`, then "
    "`save_pretrained(DIR)`",
}
_OTHERWISE = "dequantise it with the tool that made it, or get the checkpoint that it was made from"


def refuse_quantised(ref: str, headers: Mapping[str, Header], config: Mapping[str, Any]) -> None:
    """Raise ValueError if the weights are quantised, naming the scheme and the way back to plain weights."""
    found = _declared(config) or _stored(headers)
    if found is None:
        return
    scheme, evidence = found
    back = next((way for word, way in _BACK.items() if word in scheme.lower()), _OTHERWISE)
    raise ValueError(
        f"{ref}: quantised with {scheme} ({evidence}), which cannot be compared as weights; {back}"
    )


def _declared(config: Mapping[str, Any]) -> tuple[str, str] | None:
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return None
    method = str(settings.get("quant_method") or "an unnamed method")
    for bits in (4, 8):
        if settings.get(f"load_in_{bits}bit") or settings.get(f"_load_in_{bits}bit"):
            return f"bitsandbytes {bits}-bit", "config.json: quantization_config"
    if isinstance(settings.get("bits"), int):
        method += f" {settings['bits']}-bit"
    return method, "config.json: quantization_config"


def _stored(headers: Mapping[str, Header]) -> tuple[str, str] | None:
    for mark, scheme in _MARKS.items():
        for name in headers:
            if name.endswith(mark):
                return scheme, name
    for name, header in headers.items():
        if header.dtype in _FLOAT8:
            return f"{str(header.dtype).removeprefix('torch.')} without scales", name
        if header.dtype in _TORCH_CODES:
            return "torch.ao quantisation", name
        if name.endswith(".weight") and len(header.shape) >= 2 and not header.dtype.is_floating_point:
            return f"{str(header.dtype).removeprefix('torch.')} codes", name
    return None
