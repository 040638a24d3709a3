"""What a row says to the chat template and the template does not read, so that the row is learned without it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING, cast

from dpo_core.data.groups import Group
from dpo_core.data.messages import Message, Text
from dpo_core.encoding.encode import render, variables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def unread(group: Group, tokenizer: "PreTrainedTokenizerBase", *, today: date | None = None) -> Iterator[str]:
    """`messages/name`, `messages/tool_call_id` where only it tells which call a result is of, and keys of
    `chat_template_kwargs`. Of a group that was encoded."""
    if isinstance(group.prompt, str):
        return
    texts = cast(list[list[Message]], [group.prompt, *group.completions])
    named = {message["role"] for text in texts for message in text if "name" in message}
    # A tool's name stands in the call that it answers.
    if not all(_writes(group, "name", role, tokenizer, today) for role in named - {"tool"}):
        yield "messages/name"
    if any(map(_are_mixed, texts)) and not _writes(group, "tool_call_id", "tool", tokenizer, today):
        yield "messages/tool_call_id"
    if group.template_arguments:
        read = variables(tokenizer.get_chat_template(None, group.tools))
        yield from (f"chat_template_kwargs/{key}" for key in sorted(group.template_arguments.keys() - read))


def _are_mixed(messages: Sequence[Message]) -> bool:
    """Whether results come in another order than their calls."""
    calls = [call.get("id") for message in messages for call in message.get("tool_calls", ())]
    results = [message.get("tool_call_id") for message in messages if message["role"] == "tool"]
    return results != calls[: len(results)]


def _writes(group: Group, key: str, role: str, tokenizer: "PreTrainedTokenizerBase", today: date | None) -> bool:
    """Whether the group looks otherwise without this key of the role's messages."""

    def bare(text: Text) -> Text:
        messages = cast(list[Message], text)
        return [_without(key, message) if message["role"] == role else message for message in messages]

    other = replace(group, prompt=bare(group.prompt), completions=tuple(map(bare, group.completions)))
    try:
        own, without = render([group, other], tokenizer, today)
    except Exception:  # a template is a stranger's program, and may want the key
        return True
    return own != without


def _without(key: str, message: Message) -> Message:
    return cast(Message, {name: value for name, value in message.items() if name != key})
