"""The rules by which training splits weights and sizes packs; a plan follows them, too. Standard library only."""

from collections.abc import Callable, Sequence
from typing import Literal

# Logits held at a time: on a CPU so few rows that caches help, on a GPU enough to fill it; of any vocabulary no more
# columns than these.
TILE_ROWS = {"cpu": 256, "cuda": 1024}
TILE_COLUMNS = 32768
MOST_TOKENS = {"cpu": 8192, "cuda": 32768}  # of a pack; more keep the device no busier
STATE_SHARE = 0.5  # of a GPU's memory, for weights, gradients and AdamW's moments; the rest is for packs
PACK_SHARE = 0.6  # of what is free, for what backward needs; the rest is for passing buffers


def fewest_shards(choices: Sequence[int], state: Callable[[int], int], room: float) -> int:
    """The rule of `auto`: the first of the choices whose state, in bytes, fits on a GPU of so much memory, else the
    last.

    Within a node splitting costs little, so whole weights are split there at least. Adapters are copied, base and all.
    Both are split over more ranks only where they would not fit. Models on CPUs, and those that answer one completion
    at a time, are always copied.
    """
    return next((shards for shards in choices if state(shards) <= STATE_SHARE * room), choices[-1])


def choose_pack(
    budget: int | None, kept: int, borders: int, *, given: int | None, wanted: str, least: int, most: int
) -> tuple[int, Literal["on", "off"], int]:
    """The tokens of a pack, whether layers are computed again, and how many tokens there is room for.

    `budget`, in bytes, is what packs may take; None: it is not known. `kept` are the bytes that autograd keeps of a
    token, `borders` those that it keeps if layers are computed again. Powers of two, so that a little more or less
    free memory decides the same.
    """
    again = budget is not None and budget // kept < (given or least)
    choice: Literal["on", "off"] = "on" if wanted == "on" or (wanted == "auto" and again) else "off"
    fits = most if budget is None else min(most, budget // (borders if choice == "on" else kept))
    return given or max(least, 1 << max(0, fits.bit_length() - 1)), choice, fits
