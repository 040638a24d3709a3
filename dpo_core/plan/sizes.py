"""Plans how much memory training needs for Llama-like models of several sizes on GPUs of 80 GB. `python -m
dpo_core.plan.sizes` prints the plans as a table."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace

from dpo_core.plan.inputs import Rows, Run, Shapes
from dpo_core.plan.plan import in_gb, plan

GPU_BYTES = 80 * 10**9
SIZES = {
    "1B": (2048, 8192, 16, 32, 8, 128256, True),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "70B": (8192, 28672, 80, 64, 8, 128256, False),
}
NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
PAIRS = Rows(groups=10_000, prompt=512, completion=256, longest=2048)


def llama(config: Mapping[str, int]) -> Shapes:
    """Returns the config and the shapes of the weights of a Llama-like model. `config` must have the keys that NAMES
    lists."""
    return Shapes({"model_type": "llama", **config}, dict(_weights(config)))


def _weights(config: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, wide, layers, heads, key_heads, vocabulary, tied = (config[name] for name in NAMES)
    keys = hidden // heads * key_heads
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in (f"model.layers.{number}" for number in range(layers)):
        for name, outputs in {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "o_proj": hidden}.items():
            yield f"{layer}.self_attn.{name}.weight", (outputs, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (wide, hidden)
        yield f"{layer}.mlp.up_proj.weight", (wide, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, wide)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocabulary, hidden)


def table() -> str:
    """Returns a Markdown table: for each model and number of GPUs, the most memory that a training worker needs,
    whether this fits on a GPU of 80 GB, and the changes of options that make it fit."""
    lines = ["| model | trained | 1 GPU | 4 GPUs | 8 GPUs |", "|---|---|---|---|---|"]
    for size, values in SIZES.items():
        shapes = llama(dict(zip(NAMES, values, strict=True)))
        for trained, rank in (("all", None), ("LoRA r 32", 32)):
            run = Run(precision="bfloat16", adapter=rank, batch_size=64, device="cuda")
            cells = [_cell(shapes, replace(run, num_workers=number)) for number in (1, 4, 8)]
            lines.append(" | ".join([f"| {size}", trained, *cells]) + " |")
    return "\n".join(lines)


def _cell(shapes: Shapes, run: Run) -> str:
    planned = plan(shapes, run, PAIRS, GPU_BYTES, most_workers=run.num_workers)
    held = in_gb(planned.memory.total)
    if planned.fits:
        return f"{held}: fits"
    remedy = " and ".join(f"`{change.field}: {json.dumps(change.value)}`" for change in planned.changes)
    return f"{held}: " + (f"fits with {remedy}" if remedy else "no")


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
