"""Refusal of quantised weights: stored codes are not weights, and have no meaningful spectrum."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from probes.errors import InputError
from probes.files.layout import Header

# Endings of stored names, most specific first, and the scheme that writes them.
_MARKS = {
    ".g_idx": "GPTQ",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes 4-bit (nf4)",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes 4-bit (fp4)",
    ".absmax": "bitsandbytes 4-bit",
    ".quant_map": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    ".weight_packed": "compressed-tensors",
    ".q_weight": "EXL2",
    ".W_q": "HQQ",
}
_SCALES = (".weight_scale", ".weight_scale_inv")

# How to get plain weights, by a word of the scheme's name.
_BACK = {
    "without scales": "nothing in the file says what its numbers stand for; get the unquantised checkpoint",
    "bitsandbytes": "load it by transformers, then `model.dequantize().save_pretrained(DIR)`",
    "mxfp4": "load it by transformers with `Mxfp4Config(dequantize=True)`, then `save_pretrained(DIR)`",
    "fp8": "load it with `FineGrainedFP8Config(dequantize=True)`, then `save_pretrained(DIR)`",
    "compressed-tensors": "load it by transformers with `CompressedTensorsConfig(dequantize=True)`, then "
    "`save_pretrained(DIR)`",
}
_OTHERWISE = "dequantise it with the tool that made it, or get the checkpoint that it was made from"


def refuse_quantised(ref: str, headers: Mapping[str, Header], config: Mapping[str, Any]) -> None:
    """Raise InputError if the weights are quantised, naming the scheme and the way back to plain weights."""
    for scheme, sign in [*_declared(config), *_stored(headers)]:
        back = next((way for word, way in _BACK.items() if word in scheme.lower()), _OTHERWISE)
        raise InputError(f"{ref}: quantised with {scheme} ({sign}) and cannot be compared as weights; {back}")


def _declared(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Schemes declared in config.json, also for the text model inside a multimodal one."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        settings = part.get("quantization_config")
        if not isinstance(settings, Mapping) or not settings:
            continue
        method = str(settings.get("quant_method") or "an unnamed method")
        if isinstance(settings.get("bits"), int):
            method += f" {settings['bits']}-bit"
        for bits in (4, 8):
            if settings.get(f"load_in_{bits}bit") or settings.get(f"_load_in_{bits}bit"):
                method = f"bitsandbytes {bits}-bit"
        yield method, "config.json: quantization_config"


def _stored(headers: Mapping[str, Header]) -> Iterator[tuple[str, str]]:
    """Schemes evident from names and dtypes."""
    for mark, scheme in _MARKS.items():
        yield from ((scheme, name) for name in headers if name.endswith(mark))
    for name, header in headers.items():
        dtype = str(header.dtype).removeprefix("torch.")
        small = header.dtype.itemsize == 1 and header.dtype is not torch.bool
        stem = name.rpartition(".")[0]
        if name.endswith(".qweight"):
            # AWQ packs along the outputs, as the zeros are packed; GPTQ along the inputs.
            zeros = headers.get(f"{stem}.qzeros")
            packed = zeros is not None and zeros.shape[-1:] == header.shape[-1:]
            yield "AWQ" if packed else "GPTQ", name
        if name.endswith("_blocks") and small and len(header.shape) > 1:
            yield "MXFP4", name
        if name.endswith(_SCALES) and f"{stem}.weight" in headers:
            weight = headers[f"{stem}.weight"].dtype
            codes = "fp8" if weight.is_floating_point else f"{str(weight).removeprefix('torch.')} codes"
            yield f"{codes} with scales", name
        if dtype.startswith(("qint", "quint")):
            yield f"torch's {dtype}", name
    for name, header in headers.items():
        dtype = str(header.dtype).removeprefix("torch.")
        if header.dtype.is_floating_point and header.dtype.itemsize == 1:
            yield f"{dtype} without scales", name
        if name.endswith(".weight") and len(header.shape) > 1 and not header.dtype.is_floating_point:
            yield f"{dtype} codes", name
