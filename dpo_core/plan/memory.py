"""Computes the bytes of memory that a training worker needs, from the shapes of a model's weights alone. Uses only the
standard library.

The formulas are made for a Llama-like decoder; for other models the bytes of activations are an estimate. A pack holds
the groups (prompts with their completions) that go through one forward pass together. A test compares the results with
the memory that real processes use.
"""

import re
from dataclasses import dataclass, replace
from math import ceil, inf, prod
from typing import Any

from dpo_core.plan.adapters import adapted_weights, in_experts
from dpo_core.plan.inputs import FLOAT32, Rows, Run, Shapes, in_layer
from dpo_core.plan.quantization import count_quantized
from dpo_core.plan.rules import PACK_SHARE, choose_pack, fewest_shards, logits_bytes, most_logits_bytes, most_tokens


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The bytes of memory that a training worker needs for each purpose, such as weights or activations, and the most
    bytes that it needs at any one time (`total`)."""

    weights: int
    gradients: int
    masters: int  # float32 copies of the weights that are trained in half precision
    moments: int
    activations: int  # what autograd keeps of a pack (groups of one forward pass)
    head: int  # logits held at a time, and the gradients that leave the head
    masks: int
    sharding: int  # weights that FSDP gathers whole to compute with them
    exchange: int  # buffers for gradients between workers, needed after activations are freed
    checkpoint: int  # the checkpoint's copy in host memory; on a CPU it adds to the total
    loading: int  # what a worker reads of the model before it has anything else: its part, if workers split the model
    total: int

    @property
    def least(self) -> int:
        """The bytes that a training worker needs even if it computes only very few tokens in one forward pass."""
        return max(self.loading, self.weights + self.gradients + self.masters + self.moments)


def settle(model: Shapes, run: Run, rows: Rows, room: int | None) -> tuple[Run, int, Memory]:
    """Makes, for a memory plan, the decisions that training would make by itself:

    - how many tokens a pack has. A pack holds the groups (prompts with their completions) that go through one forward
      pass together.
    - whether the backward pass recomputes activations
    - into how many shards each weight is split

    Returns three values:

    - a copy of `run` with the first two decisions, in `max_tokens_per_pack` and `activation_checkpointing`
    - the number of shards
    - the memory that a training worker needs

    `run` has the options of the job, and `rows` the size of its training data. `room` is the memory of a worker's
    device in bytes; None means that it is unknown.
    """
    rows = replace(rows, copies=model.caps_attention)
    local, layers = min(run.num_workers, run.workers_per_node), model.number("num_hidden_layers")
    shards = {"replicated": 1, "hybrid": local, "full": run.num_workers, "auto": 1}[run.sharding]
    if run.sharding == "auto" and run.device == "cuda" and not run.quantized:
        places = (1 if run.adapter else local, local, run.num_workers)
        shards = fewest_shards(places, lambda n: sum(_state(model, run, n).values()), inf if room is None else room)
    layer, balanced = _kept_of_layer(model, run, rows), _balanced(model, run)
    border = model.number("hidden_size") * run.itemsize + balanced * (FLOAT32 + run.itemsize)
    of_whole_batch = run.of_whole_batch or balanced > 0
    most = run.max_tokens_per_pack or most_tokens(run.device, run.max_length, of_whole_batch=of_whole_batch)
    assert most is not None  # both devices have a rule
    logits = 0 if run.rewards else most_logits_bytes(**_head(model, run), most_rows=most)
    free = None if room is None else room - sum(_state(model, run, shards).values()) - logits
    tokens, again, _ = choose_pack(
        None if free is None else int(max(0, free) * PACK_SHARE),
        layers * layer,
        layer + layers * border,
        given=run.max_tokens_per_pack,
        wanted=run.activation_checkpointing,
        least=run.max_length,
        most=most,
    )
    run = replace(run, max_tokens_per_pack=tokens, activation_checkpointing=again)
    return run, shards, _memory(model, run, shards, rows, *_pack(run, rows, tokens))


def _pack(run: Run, rows: Rows, limit: int) -> tuple[int, bool]:
    """Returns how a worker's groups (prompts with their completions) are divided into packs. A pack holds the groups
    that go through one forward pass together, with at most `limit` tokens. `run` has the options of the job, and `rows`
    the size of its training data. Returns two values:

    - the number of tokens in the worker's largest pack
    - whether the worker computes more than one pack in an optimizer step
    """
    groups = ceil(run.batch_size / run.num_workers)
    if rows.longest > rows.computed:  # groups of different lengths fill packs up to the limit
        return max(rows.longest, min(groups * rows.computed, limit)), groups * rows.computed > limit
    packs = ceil(groups / max(1, limit // rows.computed))
    return ceil(groups / packs) * rows.computed, packs > 1


def _memory(model: Shapes, run: Run, shards: int, rows: Rows, tokens: int, several: bool) -> Memory:
    """Returns the memory that a training worker needs with the options `run` and training data of the size `rows`, if
    each weight is split into `shards` parts.

    A pack holds the groups (prompts with their completions) that go through one forward pass together. `tokens` is the
    number of tokens in the worker's largest pack. `several` says whether the worker computes more than one pack in an
    optimizer step.
    """
    size, trained, hidden = run.itemsize, count_trained(model, run), model.number("hidden_size")
    completions = tokens * rows.completions / rows.computed
    learned = int(completions * (1 if run.rewards else rows.completion))  # tokens for which the head computes logits
    again, layer = run.activation_checkpointing == "on", _kept_of_layer(model, run, rows)
    head_gradient = 0 if run.adapter or run.rewards else model.number("vocab_size") * hidden * FLOAT32
    logits = 0 if run.rewards else logits_bytes(**_head(model, run), rows=learned)
    in_head = logits + learned * hidden * FLOAT32
    last_norm = tokens * hidden * (2 * FLOAT32 + size * (not run.adapter))
    widest = (2 + again) * _intermediate(model) + 2 * hidden  # gradients held at one time within a layer
    in_layer = tokens * (layer * again + widest * size)
    in_layers, balanced = tokens * model.number("num_hidden_layers"), _balanced(model, run)
    entries = in_layers * (hidden * size + balanced * FLOAT32 if again else layer)
    after_layers = learned * hidden * size + max(last_norm, in_layer - in_head)
    router_logits = in_layers * balanced * size  # of all layers, until the head is computed
    folded = _folded_of_layer(model, run) * (1 if again else model.number("num_hidden_layers"))
    activations = folded + entries + max(after_layers, router_logits - in_head - head_gradient)
    flash = run.device == "cuda" and size < FLOAT32  # flash attention needs no masks
    unmasked = flash or rows.copies
    behind = 0 if unmasked else completions * (1 - 1 / rows.completions)  # completions that share their prompt
    masks = int(behind * (rows.completion - 1) * (rows.prompt + rows.completion - 1) * size)
    state, exchange = _state(model, run, shards), 0
    if shards > 1 and not run.adapter:
        exchange = model.outside * (size + FLOAT32 - FLOAT32 // shards)
    elif shards == 1 < run.num_workers:
        exchange = state["gradients"]
    resting = state["weights"] + state["masters"] + state["moments"] + state["sharding"]
    in_pack = activations + in_head + head_gradient + masks + several * state["gradients"]
    in_float32 = trained * FLOAT32 // shards if size < FLOAT32 else 0  # masters, or shards
    copied = trained * size + in_float32 + state["moments"]
    loading = 0 if run.quantized and run.device == "cuda" else model.numbers * size // shards  # NF4: on the host
    total = max(loading, resting + max(in_pack, state["gradients"] + exchange))
    return Memory(
        **state,
        activations=activations,
        head=in_head + head_gradient,
        masks=masks,
        exchange=exchange,
        checkpoint=copied,
        loading=loading,
        total=total + copied * (run.device == "cpu"),
    )


def _state(model: Shapes, run: Run, shards: int) -> dict[str, int]:
    """Returns the bytes that a training worker keeps from one optimizer step to the next, by purpose: weights,
    gradients and the optimizer's state. `run` has the options of the job, and `shards` is the number of parts into
    which each weight is split.

    If weights are split into several shards, the worker also holds some whole weights while it computes. These are the
    weights outside the layers, and those of two layers, because the next layer is fetched ahead.
    """
    size, trained, frozen = run.itemsize, count_trained(model, run), _frozen_bytes(model, run) if run.adapter else 0
    gathered = model.outside + 2 * (model.numbers - model.outside) // model.number("num_hidden_layers")
    return {
        "weights": (frozen + trained * (FLOAT32 if shards > 1 else size)) // shards,
        "gradients": trained * FLOAT32 // shards,
        "masters": trained * FLOAT32 if size < FLOAT32 and shards == 1 else 0,
        "moments": 2 * trained * FLOAT32 // shards,
        "sharding": gathered * size if shards > 1 else 0,
    }


NF4_BITS = 4.127  # bits of one weight, with its part of the scales of a block of 64 weights


def _frozen_bytes(model: Shapes, run: Run) -> int:
    quantized = count_quantized(model) if run.quantized else 0
    return (model.numbers - quantized) * run.itemsize + int(quantized * NF4_BITS / 8)


def count_trained(model: Shapes, run: Run) -> int:
    """Returns the number of parameters that a job with the options `run` trains: the adapter's parameters, or all
    parameters of the model if there is no adapter."""
    if run.adapter is None:
        return model.numbers
    return run.adapter * sum(_factors(name, *model.weights[name]) for name in adapted_weights(model, run.targets))


def _factors(name: str, rows: int, columns: int) -> int:
    """Returns the number of parameters that an adapter of rank 1 has on the weight called `name`, a matrix of `rows` x
    `columns`. An expert's first two weights (gate and up) share one adapter of twice the rank, because PEFT treats the
    two as one weight."""
    is_fused = in_experts(name) and not name.removesuffix(".weight").endswith(("down_proj", "w2"))
    return (1 + is_fused) * rows + columns


def _folded_of_layer(model: Shapes, run: Run) -> int:
    """Returns the bytes that autograd keeps in each layer because an adapter is on the layer's experts. Returns 0 if
    the options `run` put no adapter on experts.

    In each forward pass, PEFT adds the adapter to a copy of the experts' weights. Autograd keeps this copy.
    """
    experts = filter(in_experts, adapted_weights(model, run.targets)) if run.adapter else []
    return sum(prod(model.weights[name]) for name in experts) * run.itemsize // model.number("num_hidden_layers")


def _kept_of_layer(model: Shapes, run: Run, rows: Rows) -> int:
    """Returns the bytes that autograd keeps for the backward pass, for one token in one layer of the model. The bytes
    depend on the options `run`, such as the adapter, and on the lengths of prompts and completions in `rows`."""
    hidden, heads, size = model.number("hidden_size"), model.number("num_attention_heads"), run.itemsize
    layers = model.number("num_hidden_layers")
    width = int(model.text.get("head_dim") or hidden // heads)
    queries, keys = heads * width, model.number("num_key_value_heads", "num_attention_heads") * width
    flash = run.device == "cuda" and size < FLOAT32
    # A norm computes in float32. Autograd keeps its input, its output, and a tensor for its weight's gradient.
    normed = FLOAT32 + size * (1 if run.adapter else 2)
    of_hidden = [name for name, shape in model.weights.items() if in_layer(name) and list(shape) == [hidden]]
    number = len([name for name in of_hidden if re.search("(?<![.][qk]_)norm", name)])
    norms = number // layers * hidden * normed
    if any("q_norm" in name for name in model.weights):
        norms += (queries + keys) * (normed - size)
    if run.device == "cuda" and not flash:
        keys = queries  # keys are repeated for each query head
    # The keys of a prompt are kept once for each of its completions; flash attention does not copy its output.
    seen = rows.completions * (rows.prompt + rows.completion - 1) / rows.computed
    attention = size * ((2 if flash else 3) * queries + int(2 * keys * seen)) + FLOAT32 * heads
    if model.caps_attention:  # scores behind tanh and probabilities of each head, and keys repeated for each query head
        scores = heads * (rows.prompt + rows.completion - 1) * (FLOAT32 + (size if size == FLOAT32 else 2 * size))
        attention = size * 4 * queries + scores
    routed, adapted = _routed(model), adapted_weights(model, run.targets)
    kinds = {re.sub(r"\.\d+(?=\.)", "", name) for name in adapted}
    adapters = (run.adapter or 0) * sum(routed if in_experts(kind) else 1 for kind in kinds)
    dropped = sum(model.weights[name][1] for name in adapted) // layers * (size + 1) if run.dropout else 0
    probabilities = FLOAT32 * (_num_experts(model) + _balanced(model, run))
    mlp = size * (4 * _intermediate(model) + 2 * routed * hidden) + probabilities
    return norms + attention + mlp + size * adapters + dropped


def _balanced(model: Shapes, run: Run) -> int:
    """Returns the number of experts in a layer if training with the options `run` adds a loss that balances them; 0 if
    it does not.

    This loss needs memory: the logits of all routers are held until all layers are computed, and autograd keeps their
    float32 probabilities, even if the backward pass recomputes layers.
    """
    return _num_experts(model) if model.text.get("router_aux_loss_coef") and not run.rewards else 0


def _num_experts(model: Shapes) -> int:
    """Returns the number of experts in a layer of the model; 0 if this is unknown, or if the model has none."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((int(model.text[name]) for name in names if model.text.get(name)), 0) if _routed(model) else 0


def _routed(model: Shapes) -> int:
    """Returns the number of experts that compute each token; 0 for a model without experts."""
    has_experts = any(map(in_experts, model.weights))
    return model.number("num_experts_per_tok", "num_experts_per_token", "moe_topk") if has_experts else 0


def _intermediate(model: Shapes) -> int:
    """Returns the inner width of the model's MLP (feed-forward part). In a model with experts, this is the sum of the
    widths of those experts that compute a token."""
    if routed := _routed(model):
        return routed * model.number("moe_intermediate_size", "intermediate_size")
    return model.number("intermediate_size")


def _head(model: Shapes, run: Run) -> dict[str, Any]:
    """Returns what the memory of logits depends on, besides the number of rows: the arguments of `logits_bytes`."""
    capped = bool(model.text.get("final_logit_softcapping"))
    vocabulary = model.number("vocab_size")
    return {"device": run.device, "vocabulary": vocabulary, "itemsize": run.itemsize, "capped": capped}
