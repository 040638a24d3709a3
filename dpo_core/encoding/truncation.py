"""Keeps groups (prompts with their completions) within a limit of tokens: leaves out longer groups, or shortens them,
as the option `truncation` says."""

from dataclasses import replace

from dpo_core.config import Truncation
from dpo_core.encoding.encode import EncodedGroup


def truncate(group: EncodedGroup, max_length: int, how: Truncation) -> EncodedGroup | None:
    """Returns the group (a prompt with its completions) shortened so that its prompt and any one completion together
    have at most `max_length` tokens; None if the group must be left out. `how` is the way of cutting:

    - `drop` leaves out every longer group.
    - `keep_start` cuts the ends of completions, which then lack the end-of-sequence token.
    - `keep_end` cuts the start of the prompt so that the longest completion fits, but keeps the tokenizer's BOS. All
      completions keep the same prompt.

    A group is also left out if the cut would leave no token of the prompt or of a completion.
    """
    longest = max(map(len, group.completion_ids))
    if len(group.prompt_ids) + longest <= max_length:
        return group
    if how == "keep_start" and (room := max_length - len(group.prompt_ids)) > 0:
        others = group.others and tuple(
            tuple((start, min(stop, room)) for start, stop in spans if start < room) for spans in group.others
        )
        return replace(group, completion_ids=tuple(ids[:room] for ids in group.completion_ids), others=others)
    if how == "keep_end" and (room := max_length - longest) > 0:
        head = list(group.prompt_ids[:1]) if group.has_bos and room > 1 else []
        return replace(group, prompt_ids=[*head, *group.prompt_ids[len(head) - room :]])
    return None
