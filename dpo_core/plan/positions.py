"""Reads from a model's config how many tokens of one text the model has positions for, and refuses a longer
`max_length`. Uses only the standard library."""

from collections.abc import Mapping
from typing import Any

from dpo_core.config import MAX_LENGTH
from dpo_core.options import InvalidOption

FIELDS = ("model_type", "max_position_embeddings", "n_positions", "rope_parameters", "rope_scaling")
COUNTED = ("default", "llama3", "longrope", "su")  # kinds of rotary positions whose config counts their factor already


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Returns the number of positions (the most tokens of one text) of the model with this config.json; None if the
    config states no limit.

    If rotary positions are scaled by a factor, the result includes this factor, even where the config's own number does
    not.
    """
    text = {**config, **(config.get("text_config") or {})}
    stated = text.get("max_position_embeddings") or text.get("n_positions")
    if not isinstance(stated, int):
        return None
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]  # one for each kind of layer
    if "gemma3" in str(text.get("model_type")):  # counts its linear factor
        return stated
    return max(stated, *(_reach(part, stated) for part in parts))


def positions_in(config: object) -> int | None:
    """Returns the number of positions of a text model, as `positions_of` does, from its config in transformers."""
    return positions_of({name: getattr(config, name, None) for name in FIELDS})


def check_max_length(max_length: int, positions: int | None, what: str = "the model") -> None:
    """Raises InvalidOption if `max_length` is more than the positions of a model, which the error calls `what`. The
    default of `max_length` is never refused: for a model with fewer positions, it means this smaller number."""
    if positions is not None and max_length > positions and max_length != MAX_LENGTH:
        problem = f"max_length is {max_length}, but {what} has only {positions} positions"
        raise InvalidOption("max_length", f"{problem}; set it to {positions} or less, or leave it out.")


def _reach(rope: Mapping[str, Any], stated: int) -> int:
    """Returns the number of positions that a scaling of rotary positions gives the model; 0 if there is no scaling, or
    if `stated` counts its factor."""
    if (rope.get("rope_type") or rope.get("type") or "default") in COUNTED:
        return 0
    return int((rope.get("original_max_position_embeddings") or stated) * (rope.get("factor") or 1))
