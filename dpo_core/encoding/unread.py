"""What a row says to the chat template and the template does not read, so that the row is learned without it."""

import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from dpo_core.data.groups import Group
from dpo_core.data.messages import Message, Text
from dpo_core.encoding.encode import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own tag, which changes no text


def unread(group: Group, tokenizer: "PreTrainedTokenizerBase", *, today: date | None = None) -> Iterator[str]:
    """`messages/name` and keys of `chat_template_kwargs`, of a group that was encoded."""
    if isinstance(group.prompt, str):
        return
    texts = cast(list[list[Message]], [group.prompt, *group.completions])
    named = {message["role"] for text in texts for message in text if "name" in message}
    # A tool's name stands in the call that it answers.
    if not all(_writes_names(group, role, tokenizer, today) for role in named - {"tool"}):
        yield "messages/name"
    if group.template_arguments:
        read = _variables(tokenizer.get_chat_template(None, group.tools))
        yield from (f"chat_template_kwargs/{key}" for key in sorted(group.template_arguments.keys() - read))


def _writes_names(group: Group, role: str, tokenizer: "PreTrainedTokenizerBase", today: date | None) -> bool:
    """Whether the group looks otherwise without the names of a role."""

    def nameless(text: Text) -> Text:
        return [_nameless(message) if message["role"] == role else message for message in cast(list[Message], text)]

    other = replace(group, prompt=nameless(group.prompt), completions=tuple(map(nameless, group.completions)))
    try:
        own, without = render([group, other], tokenizer, today)
    except Exception:  # a template is a stranger's program, and may want names
        return True
    return own != without


def _nameless(message: Message) -> Message:
    return cast(Message, {key: value for key, value in message.items() if key != "name"})


@lru_cache(maxsize=8)
def _variables(template: str) -> frozenset[str]:
    """The names of what it is given that it reads anywhere."""
    from jinja2 import Environment, meta

    parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    return frozenset(meta.find_undeclared_variables(parsed))
