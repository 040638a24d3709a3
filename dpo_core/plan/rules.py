"""Holds rules that training and a plan of training share: into how many shards weights are split, how many tokens a
pack has, and how many logits are held at a time. A pack holds the groups (prompts with their completions) that go
through one forward pass together. Uses only the standard library."""

from collections.abc import Callable, Sequence
from typing import Literal

from dpo_core.plan.inputs import FLOAT32

# The size of a tile, the logits held at a time. It has few rows on a CPU, to fit into caches, and many on a GPU.
TILE_ROWS = {"cpu": 256, "cuda": 1024}
TILE_COLUMNS = 32768
KEPT_LOGITS = {
    "cpu": 2**25
}  # numbers in float32; a forward pass that has more computes them again in its backward pass
MOST_TOKENS = {"cpu": 1024, "cuda": 32768}  # in one forward pass; more are no faster
MOST_TOKENS_AT_ONCE = {"cpu": 8192, "cuda": 32768}  # the same, if a step of several packs computes each forward twice
STATE_SHARE = 0.5  # share of a GPU's memory for weights, gradients and AdamW's moments; the rest is for packs
PACK_SHARE = 0.6  # share of free memory for tensors that backward needs; the rest is for temporary tensors


def most_tokens(device: str, max_length: int, *, of_whole_batch: bool) -> int | None:
    """Returns the most tokens of a pack if memory does not limit them: at least `max_length`. Returns None for a device
    without a rule.

    `of_whole_batch` says that a gradient needs the results of the whole batch. A step of several packs then computes
    the forward pass of each pack twice, and a step of one pack does not.
    """
    most = (MOST_TOKENS_AT_ONCE if of_whole_batch else MOST_TOKENS).get(device)
    return most and max(max_length, most)


def keeps_logits(device: str, rows: int, vocabulary: int, *, capped: bool) -> bool:
    """Whether a forward pass keeps the logits of its `rows` rows (tokens) until the backward pass. If it does not, both
    compute them tile by tile. Logits that are `capped` (limited by tanh) are never kept."""
    return not capped and rows * vocabulary <= KEPT_LOGITS.get(device, 0)


def logits_bytes(device: str, rows: int, vocabulary: int, itemsize: int, *, capped: bool) -> int:
    """Returns the bytes of the logits that are held at one time for `rows` rows (tokens): all, if they are kept until
    the backward pass, or a tile.

    `itemsize` is that of the model's dtype. Logits are in float32, but the result includes copies of a tile that exist
    at the same time: one more in half precision and, if the logits are `capped` (limited by tanh), two in float32.
    """
    tile = min(rows, TILE_ROWS.get(device, TILE_ROWS["cuda"])) * min(vocabulary, TILE_COLUMNS)
    held = rows * vocabulary if keeps_logits(device, rows, vocabulary, capped=capped) else tile
    return FLOAT32 * held + tile * (2 * FLOAT32 * capped + (itemsize if itemsize < FLOAT32 else 0))


def most_logits_bytes(device: str, most_rows: int, vocabulary: int, itemsize: int, *, capped: bool) -> int:
    """Returns the largest `logits_bytes` of any number of rows up to `most_rows`."""
    kept_rows = min(most_rows, KEPT_LOGITS.get(device, 0) // vocabulary)
    return max(logits_bytes(device, rows, vocabulary, itemsize, capped=capped) for rows in (most_rows, kept_rows))


def fewest_shards(choices: Sequence[int], state: Callable[[int], int], room: float) -> int:
    """Returns the first number of shards in `choices` at which the weights, the gradients and the optimizer's state fit
    into half of a GPU's memory of `room` bytes. `state` is a function that returns the bytes of the three for a number
    of shards. If no number is enough, returns the last one.

    This rule decides if the training option `sharding` is "auto". The caller orders `choices` from few shards to many.
    For a policy with an adapter, the first choice is one shard: each rank (process of the run) holds all weights. For a
    policy without an adapter, the first choice is one shard for each GPU of a node, because sharding within a node
    costs little time. The rule is not used for models on CPUs, quantized models, and models whose architecture cannot
    compute several completions in one forward pass. Each rank always holds all weights of such a model.
    """
    return next((shards for shards in choices if state(shards) <= STATE_SHARE * room), choices[-1])


def choose_pack(
    budget: int | None, kept: int, borders: int, *, given: int | None, wanted: str, least: int, most: int
) -> tuple[int, Literal["on", "off"], int]:
    """Chooses the size of a pack, and whether the backward pass recomputes layers. A pack holds the groups (prompts
    with their completions) that go through one forward pass together. Returns three values:

    - the number of tokens in a pack
    - whether the backward pass recomputes layers, as "on" or "off"
    - the number of tokens that fit into memory, at most `most`

    `given` is the number of tokens in a pack that the user has set, and `wanted` the user's option to recompute layers:
    on, off or auto. If `given` is None, a pack has the largest power of two that fits into memory, but at least `least`
    and at most `most` tokens. It is a power of two so that a little more or less free memory does not change the
    result.

    `budget` is the memory in bytes that a pack may take. `kept` is the number of bytes that autograd keeps for each
    token if layers are not recomputed, and `borders` is this number if layers are recomputed. If `budget` is None, it
    is unknown: then `most` tokens are assumed to fit, and layers are recomputed only if `wanted` is on.
    """
    recompute = budget is not None and budget // kept < (given or least)
    choice: Literal["on", "off"] = "on" if wanted == "on" or (wanted == "auto" and recompute) else "off"
    fits = most if budget is None else min(most, budget // (borders if choice == "on" else kept))
    return given or max(least, 1 << max(0, fits.bit_length() - 1)), choice, fits
