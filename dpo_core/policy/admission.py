"""Refuses groups that a model cannot read or that training cannot compute with, and names the group's line. Groups are
checked before anything is computed."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from dpo_core.encoding.encode import EncodedGroup

LARGEST = 3.4e38  # about the largest finite number in float32


def admit(groups: Sequence[EncodedGroup], model: PreTrainedModel, *, max_length: int | None = None) -> None:
    """Raises ValueError for the first group that has ids outside the vocabulary, more tokens than `max_length` or the
    model's positions, or numbers that are not finite."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    for group in groups:
        problem = (
            _too_long(group, max_length, "max_length", "truncate it, or raise max_length")
            or _too_long(group, positions, f"the last position of {type(model).__name__}", "truncate it")
            or _unknown_ids(group, config.vocab_size)
            or _not_finite(group)
        )
        if problem:
            raise ValueError(f"Line {group.line} {problem}")


def _too_long(group: EncodedGroup, limit: int | None, name: str, remedy: str) -> str | None:
    tokens = len(group.prompt_ids) + max(map(len, group.completion_ids))
    return f"has {tokens} tokens; {name} is {limit}; {remedy}." if limit and tokens > limit else None


def _unknown_ids(group: EncodedGroup, vocabulary: int) -> str | None:
    for ids in (group.prompt_ids, *group.completion_ids):
        for id in (min(ids), max(ids)):
            if not 0 <= id < vocabulary:
                return f"holds the id {id}, outside the model's vocabulary of {vocabulary}; check the tokenizer."
    return None


def _not_finite(group: EncodedGroup) -> str | None:
    for name in ("ref_logps", "ref_head_logps"):
        values = getattr(group, name) or ()
        if not all(abs(value) <= LARGEST for value in values):
            return f"has {name} {tuple(values)}; they must be finite numbers, so score it again."
    if not 0 < group.weight <= LARGEST:
        return f"has the weight {group.weight}; it must be greater than 0 and finite."
    if not abs(group.margin or 0.0) <= LARGEST:
        return f"has the margin {group.margin}; it must be finite."
    return None
