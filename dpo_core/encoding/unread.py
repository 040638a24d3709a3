"""Finds values in a row that the chat template ignores, such as an argument that the template does not know. The model
is trained on such a row without these values."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING, cast

from dpo_core.data.groups import Group
from dpo_core.data.messages import Message, Text
from dpo_core.encoding.templates import render, variables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def unread(group: Group, tokenizer: "PreTrainedTokenizerBase", *, today: date | None = None) -> Iterator[str]:
    """Yields the names of the values in a group (a prompt with its completions) that the chat template does not read.
    The template must be able to write the group. `today` is the date that some templates write; None means the day on
    which this process first needed the date. The names are:

    - `messages/name`, the names of messages' authors
    - `messages/tool_call_id`, which says to which call a tool's result belongs. The name is yielded only if the results
      come in another order than the calls. If the order is the same, the model sees without this id which result
      belongs to which call.
    - `chat_template_kwargs/<key>`, for each argument that the template does not know
    """
    if isinstance(group.prompt, str):
        return
    texts = cast(list[list[Message]], [group.prompt, *group.completions])
    named = {message["role"] for text in texts for message in text if "name" in message}
    # The name of a tool is also in the call that the tool's message answers.
    if not all(_writes(group, "name", role, tokenizer, today) for role in named - {"tool"}):
        yield "messages/name"
    if any(map(_are_mixed, texts)) and not _writes(group, "tool_call_id", "tool", tokenizer, today):
        yield "messages/tool_call_id"
    if group.template_arguments:
        read = variables(tokenizer.get_chat_template(None, group.tools))
        yield from (f"chat_template_kwargs/{key}" for key in sorted(group.template_arguments.keys() - read))


def _are_mixed(messages: Sequence[Message]) -> bool:
    """Whether the results of tools in `messages` come in another order than the calls that they answer."""
    calls = [call.get("id") for message in messages for call in message.get("tool_calls", ())]
    results = [message.get("tool_call_id") for message in messages if message["role"] == "tool"]
    return results != calls[: len(results)]


def _writes(group: Group, key: str, role: str, tokenizer: "PreTrainedTokenizerBase", today: date | None) -> bool:
    """Whether the chat template reads the key `key` of messages by `role`. The template reads the key if the text that
    it writes for the group (a prompt with its completions) changes when the key is removed from these messages. `today`
    is the date that some templates write."""

    def bare(text: Text) -> Text:
        messages = cast(list[Message], text)
        return [_without(key, message) if message["role"] == role else message for message in messages]

    other = replace(group, prompt=bare(group.prompt), completions=tuple(map(bare, group.completions)))
    try:
        before, after = render([group, other], tokenizer, today)
    except Exception:  # a template is code from others, and may fail without the key
        return True
    return before != after


def _without(key: str, message: Message) -> Message:
    return cast(Message, {name: value for name, value in message.items() if name != key})
