"""Reads the optional columns that rows of most formats may have, and checks columns that no format reads. Uses only the
standard library.

The optional columns are a system prompt, arguments of the chat template, a weight and a margin. A column that no format
reads is accepted if it only repeats texts of the row's groups. A group is a prompt with its completions.
"""

import re
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace

from dpo_core.data.formats.column_hints import LONGEST, SYSTEM_KEYS, holds_answer
from dpo_core.data.groups import Group
from dpo_core.data.jsonl import Row, parse_within, pointer_to
from dpo_core.data.messages import Message, Text
from dpo_core.data.values import is_finite, number_of, says_nothing, shown, string_of


def system_prompt(row: Row) -> str | None:
    """Returns the system prompt in the row's column `system` or `system_prompt`; None if there is none. Raises
    InvalidRow if both columns have contents."""
    if SYSTEM_KEYS.isdisjoint(row.value):
        return None
    columns = [key for key in sorted(SYSTEM_KEYS) if not says_nothing(row.value.get(key))]
    if len(columns) > 1:
        raise row.invalid(
            f"/{columns[1]}", "duplicate_key", f"and the field /{columns[0]} mean the same; send only one."
        )
    return string_of(row, f"/{columns[0]}", row.value[columns[0]]) if columns else None


def with_system(row: Row, group: Group, system: str) -> Group:
    """Returns the group (a prompt with its completions) with the system prompt `system` as the first message of its
    prompt. The prompt must be a list of messages.

    Returns the group unchanged if its prompt already begins with this system prompt. Raises InvalidRow if the prompt
    begins with another system message.
    """
    assert isinstance(group.prompt, list)
    message: Message = {"role": "system", "content": system}
    if group.prompt[0] == message:
        return group
    if group.prompt[0]["role"] == "system":
        raise row.invalid(
            "/system", "duplicate_key", "and the first message of the prompt are two system prompts; send only one."
        )
    return replace(group, prompt=[message, *group.prompt])


# Arguments that this package passes to the template, and arguments that transformers uses itself.
_TAKEN = (
    "messages conversation conversations tools add_generation_prompt continue_final_message tokenize chat_template "
    "strftime_now raise_exception bos_token eos_token unk_token sep_token pad_token cls_token mask_token "
    "padding truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs"
)
RESERVED_ARGUMENTS = frozenset(_TAKEN.split())


def template_arguments(row: Row) -> dict[str, object] | None:
    """Returns the arguments for the chat template, such as enable_thinking, in the row's column `chat_template_kwargs`;
    None if there are none. Raises InvalidRow for an argument that a row must not set."""
    arguments = row.value.get("chat_template_kwargs")
    if arguments is None:
        return None
    if isinstance(arguments, str) and arguments:
        arguments = parse_within(row, "/chat_template_kwargs", arguments)
    if says_nothing(arguments):
        return None
    if not isinstance(arguments, dict):
        raise row.invalid("/chat_template_kwargs", "wrong_type", f"is {shown(arguments)}; it must be an object.")
    for key, value in arguments.items():
        if key in RESERVED_ARGUMENTS or not key.isidentifier():
            what = "is an argument of the chat template that the service sets itself; remove the argument."
            if not key.isidentifier():
                what = "is not a valid name of an argument (letters, digits and _ only); rename or remove the argument."
            raise row.invalid(pointer_to(("chat_template_kwargs", key)), "unknown_key", what)
        if str(value).casefold() in ("true", "false") and not isinstance(value, bool):
            what = (
                f"is the text {shown(value)}, but chat templates treat every text as true; "
                "write the value without quotes."
            )
            raise row.invalid(pointer_to(("chat_template_kwargs", key)), "wrong_type", what)
    if not is_finite(arguments):
        raise row.invalid(
            "/chat_template_kwargs", "invalid_number", "contains NaN or an infinite number; write a finite number."
        )
    return {key: value for key, value in arguments.items() if value is not None} or None


def positive_number(row: Row, name: str) -> float | None:
    """Returns the positive number in the row's column `name`, such as `weight`; None if the column is empty. A margin
    of 0 also counts as empty. Raises InvalidRow for any other value."""
    value = row.value.get(name)
    if value is None or says_nothing(value):
        return None
    number = number_of(row, f"/{name}", value)
    if name == "margin" and number == 0:
        return None
    if number <= 0:
        raise row.invalid(f"/{name}", "invalid_number", f"is {number:g}; it must be greater than 0.")
    return number


def as_chat(reader: Callable[[Row], Iterator[Group]]) -> Callable[[Row], Iterator[Group]]:
    """Returns a reader that yields the groups of `reader` with messages in place of texts. A prompt becomes a message
    of the user, and a completion becomes a message of the assistant.

    A reader is a function that yields the groups of a row. A group is a prompt with its completions.
    """

    def read(row: Row) -> Iterator[Group]:
        for group in reader(row):
            if isinstance(group.prompt, list):
                yield group
                continue
            completions: list[Text] = [[{"role": "assistant", "content": str(text)}] for text in group.completions]
            yield replace(group, prompt=[{"role": "user", "content": group.prompt}], completions=tuple(completions))

    return read


# --- columns that nothing reads -------------------------------------------------------------


def refuse_named_answers(row: Row, unread: Set[str], group: Group) -> None:
    """Raises InvalidRow if the completions of `group` (a prompt with its completions) are only names of answers, and
    the answers themselves are in `unread`, the columns that the row's format does not read.

    For example, the completions are "A" and "B", and the answers are in the columns `response_a` and `response_b`.
    """
    best = group.completions[0]
    if len(best if isinstance(best, str) else best[-1]["content"]) > LONGEST or len(group.completions) < 2:
        return  # returns early for nearly all groups
    contents = [text if isinstance(text, str) else text[-1]["content"] for text in group.completions]
    named = [next((key for key in sorted(unread) if holds_answer(key, content)), None) for content in contents]
    first, *_, last = named
    if not first or not last or None in named or (first == last and not isinstance(row.value[first], list)):
        return
    texts = list(_texts(row.value[first]))
    if texts and not set(texts).issuperset(contents) and not is_said(texts, [group]):
        what = (
            f"and the column {last} hold the answers, but the row's format reads only their names; "
            "write the answers in place of the names."
        )
        raise row.invalid(pointer_to((first,)), "unread_column", what)


def is_said(value: object, groups: Sequence[Group]) -> bool:
    """Whether one of the groups (prompts with their completions) contains all texts in `value`, the contents of a
    column. False if `value` has no text."""
    texts = [text for text in _texts(value) if text.strip()]
    return bool(texts) and any(all(_contains(said, text) for text in texts) for said in map(_all_text, groups))


def _contains(whole: str, text: str) -> bool:
    """Whether `text` occurs in `whole`, and not as a part of a longer word. Spaces around `text` do not count."""
    return re.search(rf"(?<!\w){re.escape(text.strip())}(?!\w)", whole) is not None


def _all_text(group: Group) -> str:
    return "\n".join(text for part in (group.prompt, *group.completions) for text in _texts(part))


def _texts(value: object) -> Iterator[str]:
    """Yields the texts in a value. The value is a text, a message, or a list or dictionary of texts and messages. The
    roles of messages are not yielded."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([item for key, item in value.items() if key not in ("role", "from")])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
