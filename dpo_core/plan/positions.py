"""Reads from a model's config the number of its positions, that is, the most tokens that one text can have. Refuses a
`max_length` above this number. Uses only the standard library."""

from collections.abc import Mapping
from typing import Any

from dpo_core.config import MAX_LENGTH
from dpo_core.options import InvalidOption

FIELDS = ("model_type", "max_position_embeddings", "n_positions", "rope_parameters", "rope_scaling")
COUNTED = ("default", "llama3", "longrope", "su")  # kinds of rotary positions whose config counts their factor already


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Returns the number of positions (the most tokens of one text) of the model with this config.json; None if the
    config states no limit.

    Some models stretch their rotary positions by a factor. The result includes this factor, even if the number in the
    config does not.
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
    """Returns the number of positions (the most tokens of one text) of a model, from its config as a transformers
    object; None if the config states no limit."""
    return positions_of({name: getattr(config, name, None) for name in FIELDS})


def check_max_length(
    max_length: int, positions: int | None, what: str = "the model", *, is_chosen: bool = False
) -> None:
    """Raises InvalidOption if the option `max_length` is more than `positions`, the most tokens that one text of the
    model can have (None: no limit). `what` names the model in the error.

    If `max_length` has its default value, no error is raised, because the default then stands for `positions`. With
    `is_chosen`, the user has chosen this value, so an error is raised for the default value, too.
    """
    if positions is not None and max_length > positions and (is_chosen or max_length != MAX_LENGTH):
        problem = f"max_length is {max_length}, but {what} has only {positions} positions"
        raise InvalidOption("max_length", f"{problem}; set max_length to {positions} or less, or leave it out.")


def _reach(rope: Mapping[str, Any], stated: int) -> int:
    """Returns how many tokens a text can have at most, for a model that stretches its rotary positions by a factor.
    `rope` is the part of the model's config about rotary positions, and `stated` the number of positions in the config.
    Returns 0 if the config has no factor, or if `stated` includes the factor already."""
    if (rope.get("rope_type") or rope.get("type") or "default") in COUNTED:
        return 0
    return int((rope.get("original_max_position_embeddings") or stated) * (rope.get("factor") or 1))
