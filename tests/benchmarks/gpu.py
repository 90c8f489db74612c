"""On a GPU: the intruders of a pair of 8B shape, and scoring rows beside the plain forward pass.

Without one the same runs small on the CPU, which shows that it works and nothing else.
"""

from typing import Any

import torch

from probes.passes.scores import score_examples
from probes.text.batches import batches
from tests.benchmarks.rows import examples, fastest
from tests.benchmarks.seven_b import audited, cost_text

LAYERS, WIDTH, INNER, VOCABULARY = 32, 4096, 14336, 128256
ROWS, TOKENS = 2000, 16384
SMALL = {"LAYERS": 2, "WIDTH": 128, "INNER": 352, "VOCABULARY": 8192, "ROWS": 40}
REPEATS = 3


def shapes() -> dict[str, tuple[int, int]]:
    """Of a layer; keys and values of 8 heads for 32 queries."""
    return {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (WIDTH // 4, WIDTH),
        "self_attn.v_proj": (WIDTH // 4, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }


def scoring(device: str) -> None:
    """Tokens a second of log-likelihoods, and of the plain forward pass over the same batches."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=VOCABULARY, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    rows = examples(ROWS, "paragraphs")
    device_batches = [batch.to(device) for batch in batches(rows, tokens=TOKENS, pad_id=0)]

    def finished(answer: Any) -> Any:
        if device == "cuda":
            torch.cuda.synchronize()
        return answer

    def plain() -> None:
        with torch.inference_mode():
            for batch in device_batches:
                model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
        finished(None)

    def scored() -> Any:
        return finished(score_examples(model, rows, tokens=TOKENS))

    plain(), scored()  # the first calls of a GPU choose their kernels
    (bare, ours), _ = fastest(plain, scored, repeats=REPEATS)
    tokens = sum(len(row.ids) for row in rows)
    print(
        f"log-likelihoods of {ROWS:,} rows, {tokens:,} tokens: {tokens / ours:,.0f} tokens/s; the plain "
        f"forward pass over the same batches {tokens / bare:,.0f}: {bare / ours:.0%} (at least 60 %)"
    )


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("no GPU here: small sizes on the CPU, which show that this runs and nothing else")
        globals().update(SMALL)
    else:
        print(torch.cuda.get_device_name())
    parameters = LAYERS * sum(rows * columns for rows, columns in shapes().values())
    seen = audited(shapes(), LAYERS, device)
    if seen is not None:
        shape = f"pair of {parameters / 1e9:.1f} B parameters on {device}"
        print(f"{shape} (at most 60 s beyond reading): {cost_text(seen)}")
    scoring(device)


if __name__ == "__main__":
    main()
