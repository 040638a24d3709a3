"""Holds the rules by which training, and a plan of training, split weights over ranks and choose the size of packs
(groups that one forward pass computes together). Uses only the standard library."""

from collections.abc import Callable, Sequence
from typing import Literal

# The size of a tile, the logits held at a time. It has few rows on a CPU, to fit into caches, and many on a GPU.
TILE_ROWS = {"cpu": 256, "cuda": 1024}
TILE_COLUMNS = 32768
MOST_TOKENS = {"cpu": 8192, "cuda": 32768}  # in one forward pass; more are no faster
STATE_SHARE = 0.5  # share of a GPU's memory for weights, gradients and AdamW's moments; the rest is for packs
PACK_SHARE = 0.6  # share of free memory for tensors that backward needs; the rest is for temporary tensors


def fewest_shards(choices: Sequence[int], state: Callable[[int], int], room: float) -> int:
    """Returns the first number of shards in `choices` at which the bytes `state(shards)` of weights, gradients and
    optimizer fit on a GPU of `room` bytes. Returns the last number if they never fit.

    This is the rule of sharding `auto`. The caller lists as choices the numbers of shards from few to many. A policy
    without an adapter is always split within a node, where splitting costs little. A policy with an adapter is copied,
    with its base. Both are split over more ranks only if they do not fit. Models on CPUs, and models that are computed
    one completion at a time, are always copied.
    """
    return next((shards for shards in choices if state(shards) <= STATE_SHARE * room), choices[-1])


def choose_pack(
    budget: int | None, kept: int, borders: int, *, given: int | None, wanted: str, least: int, most: int
) -> tuple[int, Literal["on", "off"], int]:
    """Returns the number of tokens in a pack (groups that one forward pass computes together), whether backward
    recomputes layers, and the number of tokens that fit into memory.

    `budget` is the memory in bytes that a pack may take; None means that it is unknown. Autograd keeps `kept` bytes for
    each token, or `borders` bytes if layers are recomputed. `given` and `wanted` are the user's choices; `least` and
    `most` bound the tokens. The number of tokens is a power of two, so that a little more or less free memory does not
    change it.
    """
    recompute = budget is not None and budget // kept < (given or least)
    choice: Literal["on", "off"] = "on" if wanted == "on" or (wanted == "auto" and recompute) else "off"
    fits = most if budget is None else min(most, budget // (borders if choice == "on" else kept))
    return given or max(least, 1 << max(0, fits.bit_length() - 1)), choice, fits
