"""Tests which keys of a row a chat template does not read."""

from dataclasses import replace

import pytest

from dpo_core.data.groups import Group
from dpo_core.encoding.unread import unread
from tests.dpo_core.encoding.test_templates import (
    ANSWERED_BY_NAME,
    ASKED_TWICE,
    CALLED,
    CHOSEN,
    FIND,
    NAMED,
    PAIRED,
    PLAIN,
    QUESTION,
    REJECTED,
    TEMPLATES,
    THINKING,
    WRITES_NAMES,
    _fresh,
    assistant,
)


def answers(*ids: str) -> Group:
    """Returns a group whose prompt has two tool calls, followed by their results in the given order."""
    results = [{"role": "tool", "content": f"dog {id}", "tool_call_id": id} for id in ids]
    return Group([QUESTION, {**assistant(""), "tool_calls": ASKED_TWICE}, *results], (CHOSEN, REJECTED), 7)


@pytest.mark.parametrize(
    ("template", "group", "found"),
    [
        (PLAIN, PAIRED, []),
        (PLAIN, NAMED, ["messages/name"]),
        (PLAIN, ANSWERED_BY_NAME, ["messages/name"]),
        (WRITES_NAMES, NAMED, []),
        (WRITES_NAMES, ANSWERED_BY_NAME, []),
        (WRITES_NAMES.replace("if m.name", "if m.name and m.role == 'user'"), ANSWERED_BY_NAME, ["messages/name"]),
        (WRITES_NAMES.replace("if m.name", "if m.role == 'user'"), NAMED, []),  # it wants one
        (PLAIN, Group([QUESTION, *CALLED], (CHOSEN, REJECTED), 7), []),
        (PLAIN, answers("a", "b"), []),
        (PLAIN, answers("b", "a"), ["messages/tool_call_id"]),
        (PLAIN.replace("m.content }}", "m.content }}{{ m.tool_call_id }}"), answers("b", "a"), []),
        (
            PLAIN,
            Group([QUESTION], (CHOSEN, REJECTED), 7, template_arguments=THINKING),
            ["chat_template_kwargs/enable_thinking", "chat_template_kwargs/reasoning_effort"],
        ),
        (
            PLAIN + "{% if enable_thinking is defined and enable_thinking is true %}<think>{% endif %}",
            Group([QUESTION], (CHOSEN, REJECTED), 7, template_arguments=THINKING),
            ["chat_template_kwargs/reasoning_effort"],
        ),
        (  # the name is read, but of a message, and it is in a comment
            PLAIN.replace("m.content }}", "m.content }}{{ m.enable_thinking }}{# reasoning_effort #}"),
            Group([QUESTION], (CHOSEN, REJECTED), 7, template_arguments=THINKING),
            ["chat_template_kwargs/enable_thinking", "chat_template_kwargs/reasoning_effort"],
        ),
        (
            "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'high' %}{% endif %}"
            + "{{ reasoning_effort }}"
            + TEMPLATES["marks what is generated"],
            Group([QUESTION], (CHOSEN, REJECTED), 7, template_arguments=THINKING),
            ["chat_template_kwargs/enable_thinking"],
        ),
        (PLAIN, Group("fox?", (" dog", " fox"), 7), []),
    ],
)
def test_keys_that_the_template_does_not_read_are_named(tokenizer, template, group, found):
    own = _fresh(tokenizer)
    own.chat_template = template
    assert list(unread(group, own)) == found


def test_only_the_template_that_is_used_decides_which_keys_are_read(tokenizer):
    own = _fresh(tokenizer)
    own.chat_template = {"default": PLAIN, "tool_use": PLAIN + "{{ xml_tools }}"}
    asked = Group([QUESTION], (CHOSEN, REJECTED), 7, template_arguments={"xml_tools": True})
    assert list(unread(asked, own)) == ["chat_template_kwargs/xml_tools"]
    assert list(unread(replace(asked, tools=[FIND]), own)) == []
