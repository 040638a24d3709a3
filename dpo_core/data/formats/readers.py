"""Reads the rows of common formats. Uses only the standard library.

Each reader is a function that yields the groups of a row. A group is a prompt with its completions, the best completion
first. A reader raises InvalidRow, with the value's JSON pointer, for a value that it cannot use.
"""

from collections.abc import Iterator, Sequence
from os.path import commonprefix

from dpo_core.data.groups import (
    Group,
    answer,
    best_first,
    completion_like,
    completions_of,
    filled,
    items,
    parted,
    question,
    rejected_like,
    text_or_messages,
)
from dpo_core.data.jsonl import Row, pointer_to
from dpo_core.data.messages import (
    Message,
    Text,
    check_completion,
    completion_of,
    dialogue_of,
    messages_of,
    prompt_of,
    refuse_empty_message,
)
from dpo_core.data.tools import TOOL_KEYS, tools_of
from dpo_core.data.values import number_of, numbers_of, refuse_empty, says_nothing, shown, string_of

SIDES = ("chosen", "rejected")
LABELS = ("label", "kto_tag")


# --- demonstrations --------------------------------------------------------------------------


def read_chat(row: Row, column: str = "messages") -> Iterator[Group]:
    """Reads a row with a conversation in its column `column`, and yields a group (a prompt with its completions) for
    each message of the assistant: the earlier messages are its prompt. Skips messages of the assistant whose key
    `weight` is 0."""
    messages = messages_of(row, f"/{column}", row.value[column])
    weights = [message.pop("weight", 1) for message in messages]
    trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and weights[i]]
    if not trained:
        raise row.invalid(
            f"/{column}",
            "nothing_to_train",
            "has no assistant message to learn from; add one, or set the key `weight` of an assistant message to 1.",
        )
    for i in trained:
        if i == 0:
            raise row.invalid(
                f"/{column}/0", "empty_prompt", "is an assistant message without a prompt before it; add a prompt."
            )
        if messages[i - 1]["role"] == "assistant":
            what = (
                "is an assistant message directly after another one; put a message of the user or a tool between them."
            )
            raise row.invalid(f"/{column}/{i}", "invalid_order", what)
        refuse_empty_message(row, f"/{column}/{i}/content", messages[i])
        yield Group(messages[:i], ([messages[i]],), row.line)


# --- pairs -----------------------------------------------------------------------------------


def read_preference(row: Row) -> Iterator[Group]:
    """Reads a row of OpenAI's preference format: an input of messages, a preferred output and a non-preferred
    output."""
    fields = row.value.get("input")
    if not isinstance(fields, dict):
        raise row.invalid("/input", "wrong_type", "must be an object with the key 'messages'.")
    for key in fields:
        if key not in TOOL_KEYS | {"messages"}:
            raise row.invalid(
                pointer_to(("input", key)),
                "unknown_key",
                "is not a key of the object /input; remove the key.",
            )
    prompt = prompt_of(row, "/input/messages", fields.get("messages"))
    outputs = [_either(row, f"{side}_output", f"{side}_completion") for side in ("preferred", "non_preferred")]
    completions = tuple(completion_of(row, f"/{key}", row.value[key]) for key in outputs)
    yield Group(prompt, completions, row.line, tools=tools_of(row, "/input", fields))


def _either(row: Row, key: str, alias: str) -> str:
    """Returns the name that the row has for a column that may have two names, `key` or `alias`. Raises InvalidRow if
    the row has both names or neither."""
    present = [name for name in (key, alias) if name in row.value]
    if len(present) == 1:
        return present[0]
    if present:
        raise row.invalid(f"/{alias}", "duplicate_key", f"and the field /{key} mean the same; send only one.")
    raise row.invalid(f"/{key}", "missing_key", "is missing; add the field.")


def read_explicit(row: Row) -> Iterator[Group]:
    """Reads a row with a prompt, a chosen answer and a rejected answer."""
    prompt = text_or_messages(row, "/prompt", row.value["prompt"])
    chosen = completion_like(row, "/chosen", row.value["chosen"], prompt)
    yield Group(prompt, (chosen, rejected_like(row, "/rejected", row.value["rejected"], prompt)), row.line)


def read_answers(row: Row) -> Iterator[Group]:
    """Reads a row with a prompt, a chosen answer and a rejected answer. Each of the three may be a text or messages."""
    yield Group(
        question(row, "prompt"), (answer(row, "/chosen", row.value["chosen"]), _worse(row, "rejected")), row.line
    )


def read_conversations(row: Row) -> Iterator[Group]:
    """Reads a row with a chosen and a rejected conversation. The messages that both conversations have at their
    beginning are the prompt."""
    yield _split_conversations(row, [messages_of(row, f"/{side}", row.value[side]) for side in SIDES])


def read_dialogues(row: Row) -> Iterator[Group]:
    """Reads a row with a chosen and a rejected dialogue, each written in one text, as in the data set HH-RLHF. The
    turns that both dialogues have at their beginning are the prompt."""
    texts = (string_of(row, f"/{side}", row.value[side]) for side in SIDES)
    yield _split_conversations(
        row, [dialogue_of(row, f"/{side}", text) for side, text in zip(SIDES, texts, strict=True)]
    )


def _split_conversations(row: Row, sides: Sequence[list[Message]]) -> Group:
    prompt, completions = parted(row, SIDES, sides)
    if "prompt" in row.value and not _is_in_prompt(row, row.value["prompt"], prompt):
        raise row.invalid(
            "/prompt", "different_prompts", "must be one of the messages with which both /chosen and /rejected begin."
        )
    return Group(prompt, completions, row.line)


def _is_in_prompt(row: Row, value: object, prompt: Sequence[Message]) -> bool:
    """Whether `value`, the contents of the row's column `prompt`, adds nothing to `prompt`, a list of messages. It adds
    nothing if it is null, equals the whole prompt, or is the text of one of the messages."""
    if isinstance(value, list):
        return messages_of(row, "/prompt", value) == prompt
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        *before, last = dialogue_of(row, "/prompt", value)
        return prompt == (before if last == {"role": "assistant", "content": ""} else [*before, last])
    return value is None or value in [message["content"] for message in prompt]


def read_implicit(row: Row) -> Iterator[Group]:
    """Reads a row with a chosen and a rejected text, and no prompt. The common beginning of both texts is the prompt,
    without a space at its end, as in TRL."""
    texts = [string_of(row, f"/{side}", row.value[side]) for side in SIDES]
    prompt = commonprefix(texts).removesuffix(" ")  # noqa: RUF071 (characters are meant)
    if not prompt:
        raise row.invalid(
            "",
            "empty_prompt",
            "has no prompt, and its chosen and rejected texts have no common beginning; add the prompt as a field.",
        )
    for side, text in zip(SIDES, texts, strict=True):
        refuse_empty(row, f"/{side}", text[len(prompt) :])
    yield Group(prompt, tuple(text[len(prompt) :] for text in texts), row.line)


# --- ratings, rankings and labels --------------------------------------------------------------


def read_unpaired(row: Row) -> Iterator[Group]:
    """Reads a row with a prompt, one completion, and a label that says whether the completion is good."""
    prompt = text_or_messages(row, "/prompt", row.value["prompt"])
    completion = completion_like(row, "/completion", row.value["completion"], prompt)
    yield Group(prompt, (completion,), row.line, (_label(row, "label"),))


def _label(row: Row, column: str) -> float:
    label = row.value[column]
    if not isinstance(label, bool):
        raise row.invalid(f"/{column}", "wrong_type", f"is {shown(label)}; it must be true or false.")
    return float(label)


def read_labelled_chat(row: Row) -> Iterator[Group]:
    """Reads a row with a conversation and a label. The conversation ends with a message of the assistant, and the label
    says whether this message is good."""
    prompt, completion = _ending_with_an_answer(row, _either_of(row, "messages", "conversations"))
    label = _either_of(row, *LABELS)
    yield Group(prompt, (completion,), row.line, (_label(row, label),))


def _either_of(row: Row, key: str, alias: str) -> str:
    """Returns one of the keys `key` and `alias`, two names of the same column: the one whose value in the row is not
    empty. If both values are empty, returns the name that the row has. Raises InvalidRow if both have values."""
    used = [name for name in (key, alias) if not says_nothing(row.value.get(name))]
    if len(used) == 2:
        raise row.invalid(f"/{alias}", "duplicate_key", f"and the field /{key} mean the same; send only one.")
    return used[0] if used else key if key in row.value else alias


def _ending_with_an_answer(row: Row, column: str) -> tuple[list[Message], list[Message]]:
    """Splits the conversation in the row's column into two lists of messages: the prompt, and the last message alone.
    The last message must be by the assistant."""
    *prompt, last = messages_of(row, f"/{column}", row.value[column])
    pointer = f"/{column}/{len(prompt)}"
    if last["role"] != "assistant":
        raise row.invalid(pointer, "invalid_completion", "is the last message and must be an assistant message.")
    if not prompt or prompt[-1]["role"] == "assistant":
        raise row.invalid(
            pointer,
            "invalid_order",
            "is an answer without a message of the user or a tool before it; add such a message.",
        )
    check_completion(row, f"/{column}", [last], first=len(prompt))
    return prompt, [last]


def read_rejected_response(row: Row) -> Iterator[Group]:
    """Reads a row in the format of ms-swift: a conversation that ends with the better answer, and the worse answer as a
    text."""
    prompt, chosen = _ending_with_an_answer(row, "messages")
    yield Group(prompt, (chosen, _worse(row, "rejected_response")), row.line)


def _worse(row: Row, column: str) -> list[Message]:
    return answer(row, f"/{column}", row.value[column], may_be_empty=True)


def read_rejected_messages(row: Row) -> Iterator[Group]:
    """Reads a row in the format of ms-swift: a chosen and a rejected conversation that begin with the same prompt."""
    columns = ("messages", "rejected_messages")
    prompt, completions = parted(row, columns, [messages_of(row, f"/{name}", row.value[name]) for name in columns])
    yield Group(prompt, completions, row.line)


def read_answers_beside(row: Row) -> Iterator[Group]:
    """Reads a row in the format of LLaMA-Factory or axolotl: a conversation that ends with a question, and two answers
    to it."""
    column = _either_of(row, "messages", "conversations")
    prompt = prompt_of(row, f"/{column}", row.value[column])
    yield Group(prompt, (answer(row, "/chosen", row.value["chosen"]), _worse(row, "rejected")), row.line)


def read_ranked(row: Row) -> Iterator[Group]:
    """Reads a row with a prompt, and completions with ranks (1 is best) or scores (the highest is best)."""
    prompt = text_or_messages(row, "/prompt", row.value["prompt"])
    values = completions_of(row, "completions")
    completions = [completion_like(row, f"/completions/{i}", item, prompt) for i, item in enumerate(values)]
    if "ranks" in row.value and "scores" in row.value:
        raise row.invalid("/scores", "duplicate_key", "and the field /ranks mean the same; send only one.")
    key = "ranks" if "ranks" in row.value else "scores"
    numbers = numbers_of(row, f"/{key}", row.value[key], count=len(completions))
    yield best_first(row, prompt, completions, [-n for n in numbers] if key == "ranks" else numbers)


def read_ultrafeedback(row: Row) -> Iterator[Group]:
    """Reads a row of the data set UltraFeedback: an instruction, and responses with overall scores."""
    instruction = string_of(row, "/instruction", row.value["instruction"])
    completions, scores = _answers(row, "completions", text="response", number="overall_score")
    yield best_first(row, [{"role": "user", "content": instruction}], completions, scores)


def read_nectar(row: Row) -> Iterator[Group]:
    """Reads a row of the data set Nectar: a prompt, written as a dialogue in one text, and answers with ranks."""
    prompt = dialogue_of(row, "/prompt", string_of(row, "/prompt", row.value["prompt"]))
    if len(prompt) < 2 or prompt[-1] != {"role": "assistant", "content": ""}:
        raise row.invalid(
            "/prompt",
            "invalid_order",
            'must be a dialogue that ends with "\\n\\nAssistant:", after which the answers go.',
        )
    completions, ranks = _answers(row, "answers", text="answer", number="rank")
    yield best_first(row, prompt[:-1], completions, [-rank for rank in ranks])


def _answers(row: Row, key: str, *, text: str, number: str) -> tuple[list[Text], list[float]]:
    """Returns two lists: the answers in the row's list `key`, and a number for each answer, such as its score. Each
    element of the row's list is a dictionary that has the answer under the key `text` and the number under the key
    `number`."""
    answers: list[Text] = []
    numbers = []
    for i, item in enumerate(items(row, key, text, number)):
        answers.append([{"role": "assistant", "content": filled(row, f"/{key}/{i}/{text}", item[text])}])
        numbers.append(number_of(row, f"/{key}/{i}/{number}", item[number]))
    return answers, numbers
