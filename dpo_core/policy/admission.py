"""Checks groups before training computes with them. Refuses a group that the model cannot read or that training cannot
compute with; the error names the group's line in its file. A group is a prompt with its completions."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from dpo_core.encoding.encode import EncodedGroup, Outline
from dpo_core.plan.positions import positions_in

LARGEST = 3.4e38  # about the largest finite number in float32


def admit(groups: Sequence[EncodedGroup], model: PreTrainedModel, *, max_length: int | None = None) -> None:
    """Raises ValueError for the first group (a prompt with its completions) that cannot be used, and names its line. A
    group can be used if:

    - all its token ids are in the vocabulary; this is not checked for an outline (a group whose ids are not loaded yet)
    - its prompt and its longest completion together have at most `max_length` tokens (None: no limit), and at most as
      many as the model has positions
    - its reference scores and its margin, if it has them, are neither NaN nor infinite, and its weight is positive and
      finite
    """
    config, positions = model.config.get_text_config(), last_position(model)
    for group in groups:
        problem = (
            _too_long(group, max_length, "max_length", "shorten the row, or raise max_length")
            or _too_long(
                group, positions, "the model's number of positions (max_position_embeddings)", "shorten the row"
            )
            or _unknown_ids(group, config.vocab_size)
            or _not_finite(group)
        )
        if problem:
            raise ValueError(f"Line {group.line} {problem}")


def check_ids(groups: Sequence[EncodedGroup]) -> None:
    """Raises ValueError for the first group (a prompt with its completions) whose token ids are not loaded yet. Such a
    group, an outline, has ranges in place of the ids, and the model would compute with the ranges."""
    for group in groups:
        if isinstance(group, Outline):
            raise ValueError(f"Line {group.line} has no token ids; pass 'load_ids', or groups that have their ids.")


def last_position(model: PreTrainedModel) -> int | None:
    """Returns the number of the model's positions, which is the most tokens that one text may have. Returns None if the
    model's config states no limit."""
    return positions_in(model.config.get_text_config())


def _too_long(group: EncodedGroup, limit: int | None, name: str, remedy: str) -> str | None:
    tokens = len(group.prompt_ids) + max(map(len, group.completion_ids))
    return f"has {tokens} tokens, but {name} is {limit}; {remedy}." if limit and tokens > limit else None


def _unknown_ids(group: EncodedGroup, vocabulary: int) -> str | None:
    if isinstance(group, Outline):
        return None
    for ids in (group.prompt_ids, *group.completion_ids):
        for id in (min(ids), max(ids)):
            if not 0 <= id < vocabulary:
                return (
                    f"has the token id {id}, but the model's vocabulary has only {vocabulary} tokens; "
                    "use the model's own tokenizer."
                )
    return None


def _not_finite(group: EncodedGroup) -> str | None:
    for name in ("ref_logps", "ref_head_logps"):
        values = getattr(group, name) or ()
        if not all(abs(value) <= LARGEST for value in values):
            return f"has {name} {tuple(values)}, which must be finite numbers; compute them again with the reference."
    if not 0 < group.weight <= LARGEST:
        return f"has the weight {group.weight}; a weight must be greater than 0 and finite."
    if not abs(group.margin or 0.0) <= LARGEST:
        return f"has the margin {group.margin}; a margin must be a finite number."
    return None
