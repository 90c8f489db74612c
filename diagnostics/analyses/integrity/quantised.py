"""The trace of a quantised base: weights that take few levels in each block.

An adapter merged into a 4- or 8-bit base gives T = dequantised base + delta. Without the delta each block of
64 entries (bitsandbytes' nf4 and fp4: 16 codes times the largest magnitude of the block), or each output
(LLM.int8: multiples of its largest magnitude / 127), lies on few levels, whereas plain weights lie on as
many as they have entries. Sources: Dettmers et al. 2023, arXiv:2305.14314, appendix E (nf4); 2022,
arXiv:2208.07339 (int8); bitsandbytes' tables (fp4).
"""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 64  # bitsandbytes' default
ENTRIES = 2**16  # enough to tell, from the first rows
FEWEST = 64  # entries of an output that can be told from a multiple of its own largest by chance
ON_LEVELS = 0.97  # share of entries on a level; of plain weights about a fifth are, by chance

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip
FP4 = tuple(
    sign * code for code in (0.0, 0.0625 / 12, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0) for sign in (1, -1)
)
CODES = {"nf4": NF4, "fp4": FP4}


def scheme(tuned: Float[Tensor, "out in"], delta: Float[Tensor, "out in"]) -> str:
    """`nf4`, `fp4` or `int8` if tuned without the delta lies on the levels of one; else empty."""
    if tuned.ndim != 2 or tuned.shape[1] < FEWEST:
        return ""
    rows = max(1, ENTRIES // tuned.shape[1])
    T, D = tuned[:rows].double(), delta[:rows].double()
    # Dequantised to bfloat16, whatever dtype the merge is stored in, and rounded once more after it.
    weights, noise = T - D, torch.finfo(torch.bfloat16).eps * T.abs()
    flat, blur = weights.flatten(), noise.flatten()
    count = flat.numel() - flat.numel() % BLOCK
    blocks, blurs = flat[:count].view(-1, BLOCK), blur[:count].view(-1, BLOCK)
    for name, codes in CODES.items():
        if _on_codes(blocks, blurs, codes):
            return name
    return "int8" if _on_multiples(weights, noise) else ""


def _on_codes(blocks: Tensor, blurs: Tensor, codes: tuple[float, ...]) -> bool:
    """Whether the entries of each block are codes times the block's largest magnitude."""
    largest = blocks.abs().amax(dim=1, keepdim=True)
    usable = largest.squeeze(1) > 0
    if not usable.any():
        return False
    normed = (blocks / largest)[usable]
    levels = torch.tensor(sorted(codes), dtype=normed.dtype)
    distance = (normed.unsqueeze(-1) - levels).abs().amin(dim=-1)
    # The largest is itself rounded, which moves every level in proportion.
    top = (blurs / largest)[usable]
    room = top + normed.abs() * top.gather(1, normed.abs().argmax(dim=1, keepdim=True)) + 1e-6
    return bool((distance <= room.clamp(max=0.02)).double().mean() >= ON_LEVELS)


def _on_multiples(weights: Tensor, noise: Tensor) -> bool:
    """Whether the entries of each output are whole multiples of its largest magnitude / 127."""
    step = weights.abs().amax(dim=1, keepdim=True) / 127
    usable = step.squeeze(1) > 0
    multiples, room = (weights / step)[usable], (noise / step)[usable] + 1e-4
    # Of larger entries half precision no longer tells the multiple.
    clear = (multiples.abs() * 2 * (room / multiples.abs().clamp(min=1)) + room < 0.2) & (
        multiples.abs() < 120
    )
    if clear.sum() < FEWEST:
        return False
    distance = (multiples - multiples.round()).abs()
    drift = multiples.abs() * (room.amax() / 127)
    near = distance <= (room + drift)
    return bool(near[clear].double().mean() >= ON_LEVELS)
