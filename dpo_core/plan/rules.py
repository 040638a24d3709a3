"""Holds the rules by which training, and a plan of it, split weights and size packs. Standard library only."""

from collections.abc import Callable, Sequence
from typing import Literal

# The size of a tile of logits. On a CPU its rows are few enough for caches, on a GPU enough to keep the device busy.
TILE_ROWS = {"cpu": 256, "cuda": 1024}
TILE_COLUMNS = 32768
MOST_TOKENS = {"cpu": 8192, "cuda": 32768}  # of a pack; a larger one makes the device no busier
STATE_SHARE = 0.5  # of a GPU's memory, for weights, gradients and AdamW's moments; the rest is for packs
PACK_SHARE = 0.6  # of free memory, for tensors that backward needs; the rest is for temporary ones


def fewest_shards(choices: Sequence[int], state: Callable[[int], int], room: float) -> int:
    """Returns the first number of shards whose state, in bytes, fits on a GPU of `room` bytes, else the last.

    This is the rule of `auto`. Splitting costs little within a node, so a policy without an adapter is always split
    there. One with an adapter is copied, with its base. Both are split over more ranks only if they would not fit.
    Models on CPUs, and models that are computed one completion at a time, are always copied.
    """
    return next((shards for shards in choices if state(shards) <= STATE_SHARE * room), choices[-1])


def choose_pack(
    budget: int | None, kept: int, borders: int, *, given: int | None, wanted: str, least: int, most: int
) -> tuple[int, Literal["on", "off"], int]:
    """Returns the tokens of a pack, whether layers are recomputed, and how many tokens fit into memory.

    `budget` is the bytes that a pack may take; None: it is not known. Autograd keeps `kept` bytes for each token, and
    `borders` bytes if layers are recomputed. The tokens are a power of two, so that a little more or less free memory
    does not change them.
    """
    recompute = budget is not None and budget // kept < (given or least)
    choice: Literal["on", "off"] = "on" if wanted == "on" or (wanted == "auto" and recompute) else "off"
    fits = most if budget is None else min(most, budget // (borders if choice == "on" else kept))
    return given or max(least, 1 << max(0, fits.bit_length() - 1)), choice, fits
