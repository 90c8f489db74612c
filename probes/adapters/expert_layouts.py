"""How the factors of stacked experts (`target_parameters`) lie in an adapter's file, by who wrote it.

Of a parameter of (experts, first, last) PEFT keeps `lora_A` as (experts · r, features), expert after expert,
and `lora_B` as (features, r · experts), the experts innermost. Which features `lora_A` has changed twice:
before 0.19 the first; in 0.19.0 the last where the module says `is_transposed`, since 0.19.1 where it does
not. Unsloth trained `lora_B` with the experts outermost until September 2026, and now writes which it is.
Source: `ParamWrapper` in peft/tuners/lora/layer.py of 0.17 to 0.21; `lora_B_layout` in unsloth_zoo.
"""

import re
from collections.abc import Mapping
from typing import Any

from probes.errors import InputError

GROUPED, RANK_MAJOR = "grouped_by_expert", "rank_major"


def first_in_a(version: object, transposed: bool) -> bool | None:
    """Whether a version of PEFT gives `lora_A` the first features of a stack; None if the version is unknown.

    >>> first_in_a("0.18.1", False), first_in_a("0.21.0", False), first_in_a(None, False)
    (True, False, None)
    """
    match = re.match(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})(.*)", str(version))
    if match is None:
        return None
    number = tuple(int(part) for part in match.groups()[:3])
    # Between releases a version stands for many commits.
    if "dev" in match[4] and (0, 18, 2) <= number <= (0, 19, 1):
        return None
    if number < (0, 19, 0):
        return True
    return not transposed if number == (0, 19, 0) else transposed


def grouped(config: Mapping[str, Any], parameter: str, where: str) -> bool:
    """Whether the columns of `lora_B` lie expert after expert.

    Raises:
        InputError: an unknown layout, or an adapter of Unsloth that does not say which.
    """
    details = config.get("unsloth_fused_expert_lora")
    details = details if isinstance(details, Mapping) else {}
    parameters = details.get("parameters")
    detail = parameters.get(parameter) if isinstance(parameters, Mapping) else None
    layout = detail.get("lora_B_layout") if isinstance(detail, Mapping) else None
    layout = layout or config.get("lora_B_layout")
    if details.get("lora_A_layout", GROUPED) != GROUPED or layout not in (None, GROUPED, RANK_MAJOR):
        problem = f"packs the factors of {parameter} as {str(layout or details.get('lora_A_layout'))[:80]!r}"
        raise InputError(f"{where}: {problem}, which this version does not know; update tunescope")
    mapping = config.get("auto_mapping")
    if layout is None and isinstance(mapping, Mapping) and mapping.get("unsloth_fixed"):
        raise InputError(
            f"{where}: Unsloth trained factors of the experts' {parameter}, and adapter_config.json does not "
            f'say how lora_B is packed; add "lora_B_layout": "{GROUPED}" if its unsloth_zoo was from before '
            f'September 2026, else "{RANK_MAJOR}"'
        )
    return layout == GROUPED
