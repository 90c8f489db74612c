"""From a checkpoint's tensor names and shapes to (out, in) matrices with layer and component.

Architectures differ here and nowhere else, as data: which leaf name means which component, which tensors are
fused and in what order, which are stored transposed.  The tables follow the modelling code of transformers.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from probes.layout import Header, Matrix, Part

_COMPONENTS = {
    "q_proj": "q_proj query q_lin query_proj wq SelfAttention.q EncDecAttention.q q_attn",
    "k_proj": "k_proj key k_lin key_proj wk SelfAttention.k EncDecAttention.k",
    "v_proj": "v_proj value v_lin value_proj wv SelfAttention.v EncDecAttention.v",
    "o_proj": "o_proj attn.c_proj crossattention.c_proj attention.output.dense crossattention.output.dense "
    "out_lin self_attn.out_proj encoder_attn.out_proj attn.out_proj attention.out_proj attention.dense "
    "self_attention.dense self_attn.dense attention.wo SelfAttention.o EncDecAttention.o attn.Wo",
    "gate_proj": "gate_proj wi_0 w1",
    "up_proj": "up_proj c_fc fc1 fc_in intermediate.dense lin1 dense_h_to_4h wi wi_1 w3 mlp.w1",
    "down_proj": "down_proj mlp.c_proj fc2 fc_out output.dense lin2 dense_4h_to_h wo w2 mlp.Wo",
    "router": "mlp.gate block_sparse_moe.gate moe.gate feed_forward.gate router mlp.shared_expert_gate",
}
_COMPONENT = {suffix: component for component, suffixes in _COMPONENTS.items() for suffix in suffixes.split()}

_EMBEDDINGS = {
    "embed": "embed_tokens wte word_embeddings embed_in tok_embeddings shared token_embedding embeddings",
    "position_embed": "wpe position_embeddings embed_positions position_embedding",
    "token_type_embed": "token_type_embeddings",
}
_EMBEDDING = {leaf: component for component, leaves in _EMBEDDINGS.items() for leaf in leaves.split()}
_HEADS = ["lm_head", "embed_out", "output_layer", "score", "classifier", "qa_outputs", "pooler", "cls", "output"]


class _Fused(NamedTuple):
    """How the rows of one stored tensor divide: `groups` equal groups, each of the parts in `order`."""

    order: tuple[str, ...]
    grouping: str = "one"


_QKV = _Fused(("q", "k", "v"))
_FUSED = {"c_attn": _QKV, "qkv_proj": _QKV, "Wqkv": _QKV, "gate_up_proj": _Fused(("gate", "up"))}

_BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_BUFFERS = re.compile(r"(?:^|[._])(?:bias|masked_bias|inv_freq|cos_cached|sin_cached|causal_mask)$")


def matrices(headers: Mapping[str, Header], config: Mapping[str, Any]) -> dict[str, Matrix]:
    """Every two-dimensional weight of a checkpoint, by its name.

    Args:
        headers: the tensors of the file by name.
        config: the checkpoint's config.json; may be empty.
    """
    transposed = any(
        name.endswith("attn.c_attn.weight") and h.shape[1] == 3 * h.shape[0] for name, h in headers.items()
    )
    found: dict[str, Matrix] = {}
    for header in headers.values():
        if len(header.shape) < 2 or not header.dtype.is_floating_point or _BUFFERS.search(header.name):
            continue
        conv1d = transposed and bool(re.search(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$", header.name))
        found.update((m.name, m) for m in _parts(header, _place(header.name), conv1d))
    return found


def _place(name: str) -> tuple[int | None, str, Part]:
    path = name.removesuffix(".weight")
    block = _BLOCK.search(path)
    if block is None:
        segments = path.split(".")
        if segments[-1] in _EMBEDDING:
            return None, _EMBEDDING[segments[-1]], "embedding"
        if any(segment in _HEADS for segment in segments):
            return None, segments[-1], "head"
        return None, segments[-1], "other"
    segments = path[block.end() :].split(".")
    for start in range(len(segments)):
        component = _COMPONENT.get(".".join(segments[start:]))
        if component is not None:
            return int(block[1]), component, "router" if component == "router" else "block"
    return int(block[1]), segments[-1], "block"


def _parts(header: Header, place: tuple[int | None, str, Part], transposed: bool) -> Iterator[Matrix]:
    layer, component, part = place
    rows, columns = header.shape[0], header.entries // header.shape[0]
    if transposed:
        rows, columns = columns, rows
    whole = Matrix(
        name=header.name, tensor=header.name, layer=layer, component=component, part=part,
        rows=rows, columns=columns, dtype=header.dtype, transposed=transposed,
    )  # fmt: skip
    fused = _FUSED.get(component)
    if layer is None or fused is None or rows % len(fused.order):
        yield whole
        return
    size = rows // len(fused.order)
    for index, letter in enumerate(fused.order):
        yield Matrix(
            name=f"{header.name}:{letter}", tensor=header.name, layer=layer, component=f"{letter}_proj", part=part,
            rows=size, columns=columns, dtype=header.dtype, transposed=transposed,
            start=index * size, stop=(index + 1) * size,
        )  # fmt: skip
