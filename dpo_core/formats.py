"""Rows to groups: the shapes in which preference data are published. Standard library only.

The keys of a row and the kinds of their values tell its format; nothing is guessed from texts but the
`\n\nHuman:` that begins a dialogue.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

from dpo_core.jsonl import Row, pointer_to
from dpo_core.messages import (
    Message,
    Text,
    completion_of,
    dialogue_of,
    messages_of,
    prompt_of,
    refuse_empty_message,
)
from dpo_core.options import Kind
from dpo_core.tools import TOOL_KEYS, Tool, tools_of
from dpo_core.values import number_of, numbers_of, refuse_empty, shown, string_of


@dataclass(frozen=True)
class Group:
    """A prompt and its completions, best first: one is a demonstration, two are a pair."""

    prompt: Text
    completions: tuple[Text, ...]
    line: int  # where it stands in the file, from 1
    ratings: tuple[float, ...] | None = None  # higher is better, equal is a tie; None: the order says it
    weight: float = 1.0  # of its loss
    margin: float | None = None  # by which the first completion should lead
    tools: list[Tool] | None = None  # that the prompt offers, for the chat template


@dataclass(frozen=True)
class Format:
    name: str
    kind: Kind
    keys: frozenset[str]  # what its reader uses
    matches: Callable[[dict[str, object]], bool]
    reader: Callable[[Row], Iterator[Group]]

    def read(self, row: Row) -> Iterator[Group]:
        """The groups of a row. Raises InvalidRow."""
        weight, margin = (_extra(row, name) if name in self.keys else None for name in ("weight", "margin"))
        tools = tools_of(row, "", row.value) if self.keys >= TOOL_KEYS else None
        for group in self.reader(row):
            if tools and isinstance(group.prompt, str):
                raise row.invalid("/tools", "unsupported", "is for prompts of messages; write them into the text.")
            if (weight, margin, tools) == (None, None, None):
                yield group
                continue
            yield replace(group, weight=1.0 if weight is None else weight, margin=margin, tools=group.tools or tools)


def detect(row: Row) -> Format:
    """Raises InvalidRow for a row of no known format."""
    for form in FORMATS:
        if form.matches(row.value):
            return form
    known = ", ".join(form.name for form in FORMATS)
    raise row.invalid("", "unknown_format", f"{keys_of(row)}, of none of the known formats: {known}.")


def keys_of(row: Row) -> str:
    return "its keys are " + (", ".join(key[:40] for key in sorted(row.value)[:10]) or "none")


# --- demonstrations --------------------------------------------------------------------------


def _read_chat(row: Row) -> Iterator[Group]:
    messages = messages_of(row, "/messages", row.value["messages"])
    trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and _weight(row, i) != 0]
    if not trained:
        raise row.invalid("/messages", "nothing_to_train", "has no assistant message whose weight is not 0.")
    for i in trained:
        if i == 0:
            raise row.invalid("/messages/0", "empty_prompt", "is an assistant message with nothing before it.")
        if messages[i - 1]["role"] == "assistant":
            what = "follows an assistant message; put the user's or a tool's between."
            raise row.invalid(f"/messages/{i}", "invalid_order", what)
        refuse_empty_message(row, f"/messages/{i}/content", messages[i])
        yield Group(messages[:i], ([messages[i]],), row.line)


def _weight(row: Row, index: int) -> object:
    messages = row.value["messages"]
    assert isinstance(messages, list)  # `messages_of` has seen it
    return messages[index].get("weight")


# --- pairs -----------------------------------------------------------------------------------


def _read_preference(row: Row) -> Iterator[Group]:
    given = row.value.get("input")
    if not isinstance(given, dict):
        raise row.invalid("/input", "wrong_type", "must be a dictionary with messages.")
    for key in given:
        if key not in TOOL_KEYS | {"messages"}:
            raise row.invalid(pointer_to(("input", key)), "unknown_key", "is not a key of input.")
    prompt = prompt_of(row, "/input/messages", given.get("messages"))
    outputs = [_either(row, f"{side}_output", f"{side}_completion") for side in ("preferred", "non_preferred")]
    completions = tuple(completion_of(row, f"/{key}", row.value[key]) for key in outputs)
    yield Group(prompt, completions, row.line, tools=tools_of(row, "/input", given))


def _either(row: Row, key: str, alias: str) -> str:
    present = [name for name in (key, alias) if name in row.value]
    if len(present) == 1:
        return present[0]
    if present:
        raise row.invalid(f"/{alias}", "duplicate_key", f"and {key} mean the same; send one.")
    raise row.invalid(f"/{key}", "missing_key", "is missing.")


def _read_explicit(row: Row) -> Iterator[Group]:
    prompt = _prompt(row, "/prompt", row.value["prompt"])
    yield Group(prompt, tuple(_completion(row, f"/{side}", row.value[side], prompt) for side in _SIDES), row.line)


def _read_conversations(row: Row) -> Iterator[Group]:
    """What both conversations begin with is the prompt."""
    yield _split_conversations(row, [messages_of(row, f"/{side}", row.value[side]) for side in _SIDES])


def _read_dialogues(row: Row) -> Iterator[Group]:
    texts = (string_of(row, f"/{side}", row.value[side]) for side in _SIDES)
    yield _split_conversations(
        row, [dialogue_of(row, f"/{side}", text) for side, text in zip(_SIDES, texts, strict=True)]
    )


def _split_conversations(row: Row, sides: Sequence[list[Message]]) -> Group:
    (*prompt, _), other = sides
    if not prompt or other[:-1] != prompt:
        what = "and chosen must begin with the same messages, the prompt, and differ in the last, the assistant's."
        raise row.invalid("/rejected", "different_prompts", what)
    asked = row.value.get("prompt")
    if asked is not None and asked != prompt[-1]["content"]:
        raise row.invalid("/prompt", "different_prompts", "must be the message before the last one of chosen.")
    for side, messages in zip(_SIDES, sides, strict=True):
        last = f"/{side}/{len(messages) - 1}"
        if messages[-1]["role"] != "assistant":
            raise row.invalid(last, "invalid_completion", "must be a message of the assistant.")
        refuse_empty_message(row, last, messages[-1])
    if prompt[-1]["role"] == "assistant":
        what = "ends the prompt; end it with the user's or a tool's."
        raise row.invalid(f"/chosen/{len(prompt) - 1}", "invalid_order", what)
    return Group(prompt, tuple([messages[-1]] for messages in sides), row.line)


def _read_implicit(row: Row) -> Iterator[Group]:
    """What both texts begin with is the prompt, up to the last space before they differ, as in TRL."""
    texts = [string_of(row, f"/{side}", row.value[side]) for side in _SIDES]
    prompt = commonprefix(texts).removesuffix(" ")  # noqa: RUF071 (characters are meant)
    if not prompt:
        raise row.invalid("", "empty_prompt", "chosen and rejected begin differently; give the row a prompt.")
    for side, text in zip(_SIDES, texts, strict=True):
        refuse_empty(row, f"/{side}", text[len(prompt) :])
    yield Group(prompt, tuple(text[len(prompt) :] for text in texts), row.line)


# --- ratings, rankings and labels --------------------------------------------------------------


def _read_unpaired(row: Row) -> Iterator[Group]:
    prompt = _prompt(row, "/prompt", row.value["prompt"])
    completion = _completion(row, "/completion", row.value["completion"], prompt)
    label = row.value["label"]
    if not isinstance(label, bool):
        raise row.invalid("/label", "wrong_type", f"is {shown(label)}; it must be true or false.")
    yield Group(prompt, (completion,), row.line, (float(label),))


def _read_ranked(row: Row) -> Iterator[Group]:
    prompt = _prompt(row, "/prompt", row.value["prompt"])
    given = _list(row, "/completions", row.value["completions"])
    completions = [_completion(row, f"/completions/{i}", item, prompt) for i, item in enumerate(given)]
    if "ranks" in row.value and "scores" in row.value:
        raise row.invalid("/scores", "duplicate_key", "and ranks say the same; send one.")
    key = "ranks" if "ranks" in row.value else "scores"
    numbers = numbers_of(row, f"/{key}", row.value[key], count=len(completions))
    yield _best_first(row, prompt, completions, [-n for n in numbers] if key == "ranks" else numbers)


def _read_ultrafeedback(row: Row) -> Iterator[Group]:
    instruction = string_of(row, "/instruction", row.value["instruction"])
    completions, scores = _answers(row, "completions", text="response", number="overall_score")
    yield _best_first(row, [{"role": "user", "content": instruction}], completions, scores)


def _read_nectar(row: Row) -> Iterator[Group]:
    prompt = dialogue_of(row, "/prompt", string_of(row, "/prompt", row.value["prompt"]))
    if len(prompt) < 2 or prompt[-1] != {"role": "assistant", "content": ""}:
        raise row.invalid("/prompt", "invalid_order", 'must end with "\\n\\nAssistant:", where the answers go.')
    completions, ranks = _answers(row, "answers", text="answer", number="rank")
    yield _best_first(row, prompt[:-1], completions, [-rank for rank in ranks])


def _best_first(row: Row, prompt: Text, completions: Sequence[Text], ratings: Sequence[float]) -> Group:
    order = sorted(range(len(ratings)), key=lambda i: -ratings[i])
    if len(order) < 2:
        raise row.invalid("", "too_few_completions", "has one completion; a ranking needs two.")
    return Group(prompt, tuple(completions[i] for i in order), row.line, tuple(ratings[i] for i in order))


def _list(row: Row, pointer: str, value: object) -> list[object]:
    if not isinstance(value, list) or not value:
        raise row.invalid(pointer, "wrong_type", "must be a list of completions.")
    return value


def _answers(row: Row, key: str, *, text: str, number: str) -> tuple[list[Text], list[float]]:
    """Of a list of dictionaries, the assistant's messages and the numbers they were given."""
    answers: list[Text] = []
    numbers = []
    for i, item in enumerate(_list(row, f"/{key}", row.value[key])):
        if not isinstance(item, dict) or not item.keys() >= {text, number}:
            raise row.invalid(f"/{key}/{i}", "wrong_type", f"must be a dictionary with {text} and {number}.")
        answers.append([{"role": "assistant", "content": _filled(row, f"/{key}/{i}/{text}", item[text])}])
        numbers.append(number_of(row, f"/{key}/{i}/{number}", item[number]))
    return answers, numbers


def _extra(row: Row, name: str) -> float | None:
    """What people say of the row as a whole."""
    if row.value.get(name) is None:
        return None
    number = number_of(row, f"/{name}", row.value[name])
    if number <= 0:
        raise row.invalid(f"/{name}", "invalid_number", f"is {number:g}; it must be greater than 0.")
    return number


# --- prompts and completions, as texts or as messages ---------------------------------------------


def _prompt(row: Row, pointer: str, value: object) -> Text:
    return prompt_of(row, pointer, value) if isinstance(value, list) else string_of(row, pointer, value)


def _completion(row: Row, pointer: str, value: object, prompt: Text) -> Text:
    """In the form of its prompt."""
    return completion_of(row, pointer, value) if isinstance(prompt, list) else _filled(row, pointer, value)


def _filled(row: Row, pointer: str, value: object) -> str:
    text = string_of(row, pointer, value)
    refuse_empty(row, pointer, text)
    return text


_SIDES = ("chosen", "rejected")
_SIDES_KEYS = frozenset({*_SIDES, "weight", "margin"})
_PAIR_KEYS = _SIDES_KEYS | TOOL_KEYS | {"prompt"}
_RANKED_KEYS = TOOL_KEYS | {"prompt", "completions", "ranks", "scores", "weight"}


def _is_dialogues(row: dict[str, object]) -> bool:
    return all(isinstance(text := row.get(side), str) and text.startswith("\n\nHuman:") for side in _SIDES)


def _has(*keys: str, **kinds: type) -> Callable[[dict[str, object]], bool]:
    """Whether a row has the keys, and values of these kinds."""
    wanted = {*keys, *kinds}
    return lambda row: row.keys() >= wanted and all(isinstance(row[key], kind) for key, kind in kinds.items())


FORMATS = (
    Format(
        "OpenAI preference",
        "pairs",
        frozenset(
            {"input", "preferred_output", "non_preferred_output", "preferred_completion", "non_preferred_completion"}
        ),
        _has("input"),
        _read_preference,
    ),
    Format(
        "prompt/chosen/rejected conversations",
        "pairs",
        _PAIR_KEYS,
        _has(*_SIDES, prompt=list),
        _read_explicit,
    ),
    Format(
        "chosen/rejected conversations that hold their prompt",
        "pairs",
        _PAIR_KEYS,
        _has(chosen=list, rejected=list),
        _read_conversations,
    ),
    Format(
        "prompt/chosen/rejected texts",
        "pairs",
        _PAIR_KEYS,
        _has("prompt", *_SIDES),
        _read_explicit,
    ),
    Format("HH-RLHF dialogues", "pairs", _SIDES_KEYS, _is_dialogues, _read_dialogues),
    Format(
        "chosen/rejected texts that hold their prompt",
        "pairs",
        _SIDES_KEYS,
        _has(*_SIDES),
        _read_implicit,
    ),
    Format(
        "prompt/completion/label",
        "unpaired",
        TOOL_KEYS | {"prompt", "completion", "label", "weight"},
        _has("prompt", "completion", "label"),
        _read_unpaired,
    ),
    Format("prompt/completions/ranks", "rankings", _RANKED_KEYS, _has("prompt", "completions", "ranks"), _read_ranked),
    Format("prompt/completions/scores", "ratings", _RANKED_KEYS, _has("prompt", "completions", "scores"), _read_ranked),
    Format(
        "UltraFeedback",
        "ratings",
        frozenset({"instruction", "completions"}),
        _has("instruction", "completions"),
        _read_ultrafeedback,
    ),
    Format("Nectar", "rankings", frozenset({"prompt", "answers"}), _has("prompt", "answers"), _read_nectar),
    Format("OpenAI chat", "demonstrations", TOOL_KEYS | {"messages"}, _has("messages"), _read_chat),
)
