"""Rows to groups: the shapes in which preference data are published. Standard library only.

The keys of a row and the kinds of their values tell its format; nothing is guessed from texts but the
`\n\nHuman:` that begins a dialogue, and the `[{` of messages as JSON. A column that says what the model should see is
used, or the row is refused by its name.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property, partial

from dpo_core.data import published, readers
from dpo_core.data.columns import (
    LONGEST,
    SYSTEM_KEYS,
    TEMPLATE_KEYS,
    holds_answer,
    is_media,
    likely_columns,
    role_of,
    says_something,
)
from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow, Row, parse_within, pointer_to
from dpo_core.data.messages import Message, Text, opened
from dpo_core.data.tools import TOOL_KEYS, refuse_filled, tools_of
from dpo_core.data.values import is_finite, number_of, says_nothing, shown, string_of
from dpo_core.options import Kind


@dataclass(frozen=True)
class Format:
    name: str
    row: str  # what a row has, in Markdown
    kind: Kind
    keys: frozenset[str]  # what its reader uses
    matches: Callable[[dict[str, object]], bool]
    reader: Callable[[Row], Iterator[Group]]
    joins: bool = False  # a row rates one answer; neighbours of one prompt are one group

    def unread(self, row: Row) -> frozenset[str]:
        """The columns that no reader uses."""
        return frozenset(row.value.keys() - self.keys)

    def read(self, row: Row, unread: Set[str]) -> list[Group]:
        """The groups of a row. Raises InvalidRow, also for what stands unread and says something."""
        meant = unread and list(filter(says_something, unread))
        plain = not meant and self._beside.isdisjoint(row.value)  # as in most rows
        groups = list(self.reader(row) if plain else self._read_all(row, sorted(meant)))
        if groups and (last := groups[-1]).tools:  # of the groups of a chat the last one holds all messages
            for part in (last.prompt, *last.completions):
                for message in part if isinstance(part, list) else ():
                    refuse_filled(row, last.tools, message.get("tool_calls", ()))
        for group in groups if unread else ():
            _refuse_names(row, unread, group)
        return groups

    def _read_all(self, row: Row, unread: Sequence[str]) -> Iterator[Group]:
        """With what stands beside what the reader reads."""
        weight, margin = (_extra(row, name) if name in self.keys else None for name in ("weight", "margin"))
        tools = tools_of(row, "", row.value) if self._takes_tools else None
        arguments = _template_arguments(row) if self._takes_arguments else None
        system = _system(row) if self._takes_system else None
        groups = list(self.reader(row))
        if system:
            groups = [_with_system(row, group, system) for group in groups]
        self._refuse_unread(row, unread, groups)
        for group in groups:
            if isinstance(group.prompt, str) and (tools or arguments):
                key = "tools" if tools else "chat_template_kwargs"
                raise row.invalid(f"/{key}", "unsupported", "is for prompts of messages; write them into the text.")
            if (weight, margin, tools, arguments) == (None, None, None, None):
                yield group
                continue
            yield replace(
                group,
                weight=1.0 if weight is None else weight,
                margin=margin,
                tools=group.tools or tools,
                template_arguments=arguments,
            )

    @cached_property
    def _beside(self) -> frozenset[str]:
        """Columns that are read beside those of the reader."""
        return self.keys & (_OF_MESSAGES | {"weight", "margin"})

    @cached_property
    def _takes_tools(self) -> bool:
        return self.keys >= TOOL_KEYS

    @cached_property
    def _takes_arguments(self) -> bool:
        return self.keys >= TEMPLATE_KEYS

    @cached_property
    def _takes_system(self) -> bool:
        return self.keys >= SYSTEM_KEYS

    def _refuse_unread(self, row: Row, unread: Sequence[str], groups: Sequence[Group]) -> None:
        """A column that says what the groups do not say."""
        for key in unread:
            value = row.value[key]
            if says_nothing(value) or (value is False and role_of(key) != "label") or _is_said(value, groups):
                continue
            if is_media(key):
                what = "is not supported yet: models see texts only. Remove it to train on the texts alone."
                raise row.invalid(pointer_to((key,)), "unsupported", what)
            role = role_of(key)
            named = _if_it_helps(row, {role: key} if role and role not in row.value else {}) or "rename it"
            what = f"says more than the format {self.name} reads; {named}, or remove it."
            raise row.invalid(pointer_to((key,)), "unread_column", what)


_MAY_OPEN = "[{ \n"  # with which JSON begins


def detect(row: Row) -> Format:
    """Raises InvalidRow for a row of no known format."""
    for column in CONVERSATION_KEYS.intersection(row.value):
        if isinstance(text := row.value[column], str) and text[:1] in _MAY_OPEN:
            row.value[column] = opened(row, f"/{column}", text)
    for form in FORMATS:
        if form.matches(row.value):
            return form
    what = "of none of the known formats, which docs/use/data.md lists"
    remedy = f"name the columns of its roles (of {', '.join(sorted(ROLES))}), or rename them"
    raise row.invalid(
        "",
        "unknown_format",
        f"{keys_of(row)}, {what}; {_if_it_helps(row, likely_columns(row.value.keys())) or remedy}.",
    )


def _if_it_helps(row: Row, columns: Mapping[str, str]) -> str | None:
    """That the columns of roles should be named, where the row can be read then."""
    if not columns or not ROLES.issuperset(columns):
        return None
    try:
        renamed = row.renamed(columns)
        form = detect(renamed)
        form.read(renamed, form.unread(renamed))
    except InvalidRow:
        return None
    return f"name the columns of its roles: {', '.join(f'{role}={key}' for role, key in columns.items())}"


def keys_of(row: Row) -> str:
    return "its keys are " + (", ".join(key[:40] for key in sorted(row.value)[:10]) or "none")


def _refuse_names(row: Row, unread: Set[str], group: Group) -> None:
    """Answers that only name the columns in which the answers stand, such as A and B of response_a and response_b."""
    best = group.completions[0]
    if len(best if isinstance(best, str) else best[-1]["content"]) > LONGEST or len(group.completions) < 2:
        return  # as nearly all are
    contents = [text if isinstance(text, str) else text[-1]["content"] for text in group.completions]
    named = [next((key for key in sorted(unread) if holds_answer(key, content)), None) for content in contents]
    first, *_, last = named
    if not first or not last or None in named or (first == last and not isinstance(row.value[first], list)):
        return
    texts = list(_texts(row.value[first]))
    if texts and not set(texts).issuperset(contents) and not _is_said(texts, [group]):
        what = f"and {last} are what the answers name, and nothing reads them; write the answers themselves."
        raise row.invalid(pointer_to((first,)), "unread_column", what)


def _is_said(value: object, groups: Sequence[Group]) -> bool:
    """Whether its texts stand in a group: the column says it again."""
    texts = [text for text in _texts(value) if text.strip()]
    return bool(texts) and any(all(_stands_in(said, text) for text in texts) for said in map(_said, groups))


def _stands_in(said: str, text: str) -> bool:
    """Not within a word."""
    return re.search(rf"(?<!\w){re.escape(text.strip())}(?!\w)", said) is not None


def _said(group: Group) -> str:
    return "\n".join(text for part in (group.prompt, *group.completions) for text in _texts(part))


def _texts(value: object) -> Iterator[str]:
    """All that a text, a message, or a list or a dictionary of these says."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([item for key, item in value.items() if key not in ("role", "from")])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


# --- what any format may bring ------------------------------------------------------------------


def _system(row: Row) -> str | None:
    if SYSTEM_KEYS.isdisjoint(row.value):
        return None
    given = [key for key in sorted(SYSTEM_KEYS) if not says_nothing(row.value.get(key))]
    if len(given) > 1:
        raise row.invalid(f"/{given[1]}", "duplicate_key", f"and {given[0]} mean the same; send one.")
    return string_of(row, f"/{given[0]}", row.value[given[0]]) if given else None


def _with_system(row: Row, group: Group, system: str) -> Group:
    """Its prompt is of messages: formats of texts have one for rows with a system prompt."""
    assert isinstance(group.prompt, list)
    message: Message = {"role": "system", "content": system}
    if group.prompt[0] == message:
        return group
    if group.prompt[0]["role"] == "system":
        raise row.invalid("/system", "duplicate_key", "and the first message are two system prompts; send one.")
    return replace(group, prompt=[message, *group.prompt])


# What the template is given by us, and what transformers takes for itself before the template is called.
_TAKEN = (
    "messages conversation conversations tools add_generation_prompt continue_final_message tokenize chat_template "
    "strftime_now raise_exception bos_token eos_token unk_token sep_token pad_token cls_token mask_token "
    "padding truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs"
)
RESERVED_ARGUMENTS = frozenset(_TAKEN.split())


def _template_arguments(row: Row) -> dict[str, object] | None:
    """What the row tells the chat template beside its messages, such as enable_thinking."""
    given = row.value.get("chat_template_kwargs")
    if given is None:
        return None
    if isinstance(given, str) and given:
        given = parse_within(row, "/chat_template_kwargs", given)
    if says_nothing(given):
        return None
    if not isinstance(given, dict):
        raise row.invalid("/chat_template_kwargs", "wrong_type", f"is {shown(given)}; it must be a dictionary.")
    for key in given:
        if key in RESERVED_ARGUMENTS or not key.isidentifier():
            raise row.invalid(pointer_to(("chat_template_kwargs", key)), "unknown_key", "cannot be given by a row.")
        if str(given[key]).casefold() in ("true", "false") and not isinstance(given[key], bool):
            what = f"is the text {shown(given[key])}, and templates take any text for true; write it without quotes."
            raise row.invalid(pointer_to(("chat_template_kwargs", key)), "wrong_type", what)
    if not is_finite(given):
        raise row.invalid("/chat_template_kwargs", "invalid_number", "hold a number that JSON has not.")
    return {key: value for key, value in given.items() if value is not None} or None


def _extra(row: Row, name: str) -> float | None:
    """What people say of the row as a whole."""
    value = row.value.get(name)
    if value is None or says_nothing(value):
        return None
    number = number_of(row, f"/{name}", value)
    if name == "margin" and number == 0:
        return None  # no lead is wanted
    if number <= 0:
        raise row.invalid(f"/{name}", "invalid_number", f"is {number:g}; it must be greater than 0.")
    return number


# --- with a system prompt, texts are messages ------------------------------------------------------


def _as_chat(reader: Callable[[Row], Iterator[Group]]) -> Callable[[Row], Iterator[Group]]:
    def read(row: Row) -> Iterator[Group]:
        for group in reader(row):
            if isinstance(group.prompt, list):
                yield group
                continue
            completions: list[Text] = [[{"role": "assistant", "content": str(text)}] for text in group.completions]
            yield replace(group, prompt=[{"role": "user", "content": group.prompt}], completions=tuple(completions))

    return read


# --- the table ----------------------------------------------------------------------------------------

_OUTPUT_KEYS = frozenset(
    f"{side}_{word}" for side in ("preferred", "non_preferred") for word in ("output", "completion")
)
_OF_MESSAGES = TOOL_KEYS | TEMPLATE_KEYS | SYSTEM_KEYS
_SIDES_KEYS = frozenset({*readers.SIDES, "weight", "margin"})
_PAIR_KEYS = _SIDES_KEYS | _OF_MESSAGES | {"prompt"}
_RANKED_KEYS = _OF_MESSAGES | {"prompt", "completions", "ranks", "scores", "weight"}
_LABEL_KEYS = _OF_MESSAGES | {"prompt", "completion", "label", "weight"}
_CHAT_PAIR_KEYS = _OF_MESSAGES | {"messages", "weight", "margin"}
CONVERSATION_KEYS = frozenset(
    {*readers.SIDES, "prompt", "completion", "messages", "conversations", "context", "rejected_messages"}
    | {"conversation_a", "conversation_b"}
)

# What `columns` may name: the keys of formats that are nobody's own.
ROLES = (_PAIR_KEYS | _LABEL_KEYS | _RANKED_KEYS | {"messages"}) - {"functions", "parallel_tool_calls", "system_prompt"}

Test = Callable[[dict[str, object]], bool]


def _is_dialogues(row: dict[str, object]) -> bool:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    return (
        isinstance(chosen, str)
        and chosen.startswith("\n\nHuman:")
        and isinstance(rejected, str)
        and rejected.startswith("\n\nHuman:")
    )


def _answers_a_prompt(row: dict[str, object]) -> bool:
    """Whether one side is of messages, and the answer does not hold the prompt again."""
    prompt, chosen = row.get("prompt"), row.get("chosen")
    if isinstance(prompt, str) and isinstance(chosen, str):
        return False
    if "rejected" not in row or not isinstance(prompt, (str, list, dict)):
        return False
    if isinstance(chosen, list):
        first = chosen[0] if chosen and isinstance(chosen[0], dict) else {}
        return first.get("role", first.get("from")) not in ("system", "developer", "user", "human")
    return isinstance(chosen, dict) or (not isinstance(prompt, str) and chosen is not None)


def _is_openai(row: dict[str, object]) -> bool:
    return "input" in row and (
        isinstance(row["input"], dict) or not _OUTPUT_KEYS.isdisjoint(row) or row.keys() == {"input"}
    )


def _has(*keys: str, **kinds: type) -> Test:
    """Whether a row has the keys, and values of these kinds."""
    wanted = {*keys, *kinds}
    if not kinds:
        return wanted.issubset
    return lambda row: row.keys() >= wanted and all(isinstance(row[key], kind) for key, kind in kinds.items())


def _any(*tests: Test) -> Test:
    return lambda row: any(test(row) for test in tests)


def _beside_messages(**kinds: type) -> Test:
    return _any(_has(messages=list, **kinds), _has(conversations=list, **kinds))


def _published(name: str, reader: published.Reader, columns: str, kind: Kind = "pairs") -> Format:
    """A set with these columns, and what its rows say beside them."""
    keys = columns.split()
    row = ", ".join(f"`{key}`" for key in keys)
    return Format(name, row, kind, frozenset(keys) | SYSTEM_KEYS | TEMPLATE_KEYS | {"weight"}, _has(*keys), reader)


def _pairs_of(name: str, prompt: str, chosen: str, rejected: str) -> Format:
    form = _published(name, published.pair(prompt, chosen, rejected), f"{prompt} {chosen} {rejected}")
    return replace(form, keys=form.keys | TOOL_KEYS | {"margin"} | ({"input"} if prompt == "instruction" else set()))


_TEXTS = (
    Format(
        "prompt/chosen/rejected texts",
        "`prompt`, `chosen`, `rejected`",
        "pairs",
        _PAIR_KEYS,
        _has("prompt", *readers.SIDES),
        readers.read_explicit,
    ),
    Format(
        "prompt/completion/label",
        "`prompt`, `completion`, `label` (`true` or `false`)",
        "unpaired",
        _LABEL_KEYS,
        _has("prompt", "completion", "label"),
        readers.read_unpaired,
    ),
    Format(
        "prompt/completions/ranks",
        "`prompt`, `completions`, `ranks` (1 is best, ties allowed)",
        "rankings",
        _RANKED_KEYS,
        _has("prompt", "completions", "ranks"),
        readers.read_ranked,
    ),
    Format(
        "prompt/completions/scores",
        "`prompt`, `completions`, `scores` (higher is better, ties allowed)",
        "ratings",
        _RANKED_KEYS,
        _has("prompt", "completions", "scores"),
        readers.read_ranked,
    ),
)


def _with_system_prompt(form: Format) -> Format:
    """Its texts are messages, in each of its rows alike."""

    def matches(row: dict[str, object]) -> bool:
        return not SYSTEM_KEYS.isdisjoint(row) and form.matches(row)

    return replace(
        form,
        name=f"system, {form.name}",
        row=f"`system`, {form.row}; read as messages",
        matches=matches,
        reader=_as_chat(form.reader),
    )


FORMATS = (
    Format(
        "OpenAI preference",
        "`input.messages`, `preferred_output`, `non_preferred_output`",
        "pairs",
        _OUTPUT_KEYS | {"input"},
        _is_openai,
        readers.read_preference,
    ),
    Format(
        "prompt/chosen/rejected conversations",
        "`prompt`, `chosen`, `rejected` of messages; a text among them is the user's or the assistant's words",
        "pairs",
        _PAIR_KEYS,
        _answers_a_prompt,
        readers.read_answers,
    ),
    Format(
        "messages with chosen and rejected",
        "`messages` or `conversations` that end with a question, `chosen`, `rejected` as messages: LLaMA-Factory's, "
        "axolotl's",
        "pairs",
        _CHAT_PAIR_KEYS | {*readers.SIDES, "conversations"},
        _any(_beside_messages(chosen=dict, rejected=dict), _has(*readers.SIDES, conversations=list)),
        readers.read_answers_beside,
    ),
    Format(
        "chosen/rejected conversations that hold their prompt",
        "`chosen`, `rejected` of messages that begin alike; a text `prompt` beside them is one of these",
        "pairs",
        _PAIR_KEYS,
        _has(chosen=list, rejected=list),
        readers.read_conversations,
    ),
    Format(
        "HH-RLHF dialogues",
        r"`chosen`, `rejected` as `\n\nHuman: … \n\nAssistant: …`; read as messages",
        "pairs",
        _SIDES_KEYS | SYSTEM_KEYS | {"prompt"},
        _is_dialogues,
        readers.read_dialogues,
    ),
    *map(_with_system_prompt, _TEXTS),
    _TEXTS[0],
    _pairs_of("question/chosen/rejected", "question", *readers.SIDES),
    _pairs_of("instruction/chosen/rejected", "instruction", *readers.SIDES),
    _pairs_of("input/chosen/rejected", "input", *readers.SIDES),
    _pairs_of("prompt/chosen_response/rejected_response", "prompt", "chosen_response", "rejected_response"),
    _pairs_of("instruction/chosen_response/rejected_response", "instruction", "chosen_response", "rejected_response"),
    _pairs_of("question/response_j/response_k", "question", "response_j", "response_k"),
    Format(
        "chosen/rejected texts that hold their prompt",
        "`chosen`, `rejected`, which begin with the prompt; they part at the last space before they differ",
        "pairs",
        _SIDES_KEYS,
        _has(*readers.SIDES),
        readers.read_implicit,
    ),
    _published(
        "HelpSteer2 preference",
        published.two("prompt", "response_1", "response_2", published.strength("preference_strength")),
        "prompt response_1 response_2 preference_strength",
    ),
    replace(
        _published("HelpSteer ratings", published.read_rated, "prompt response helpfulness", "ratings"),
        row="`prompt`, `response`, `helpfulness`: one answer a row; neighbouring rows of a prompt are one group",
        joins=True,
    ),
    _published(
        "HelpSteer3 preference",
        published.two("context", "response1", "response2", published.strength("overall_preference")),
        "context response1 response2 overall_preference",
    ),
    _published(
        "PKU-SafeRLHF",
        published.two("prompt", "response_0", "response_1", published.choice("better_response_id", 0, 1)),
        "prompt response_0 response_1 better_response_id",
    ),
    _published("Chatbot Arena", published.read_arena, "conversation_a conversation_b winner"),
    replace(
        _published("AlpacaFarm", published.read_alpaca_farm, "instruction output_1 output_2 preference"),
        keys=frozenset({"instruction", "input", "output_1", "output_2", "preference", "weight"})
        | _OF_MESSAGES - TOOL_KEYS,
    ),
    _published("A or B", published.read_a_or_b, "prompt response_a response_b winner"),
    _published("SHP", published.read_shp, "history human_ref_A human_ref_B labels"),
    _published("WebGPT comparisons", published.read_webgpt, "question answer_0 answer_1 score_0 score_1"),
    replace(
        _published("OpenAI summaries", published.read_summaries, "info summaries choice"),
        matches=_has("summaries", "choice", info=dict),
    ),
    _TEXTS[1],
    _TEXTS[2],
    _TEXTS[3],
    Format(
        "UltraFeedback",
        "`instruction`, `completions` with `response` and `overall_score`",
        "ratings",
        frozenset({"instruction", "completions"}),
        _has("instruction", "completions"),
        readers.read_ultrafeedback,
    ),
    Format(
        "Nectar",
        "`prompt` as a dialogue, `answers` with `answer` and `rank`",
        "rankings",
        frozenset({"prompt", "answers"}),
        _has("prompt", "answers"),
        readers.read_nectar,
    ),
    _published("NeMo RL preference", published.read_ranked_completions, "context completions", "rankings"),
    replace(
        _published("Vertex AI preference", published.read_vertex, "contents completions", "ratings"),
        row="`contents`, `completions`, and `systemInstruction` if there is one",
        keys=frozenset({"contents", "completions", "weight", *published.VERTEX_SYSTEM_KEYS})
        | SYSTEM_KEYS
        | TEMPLATE_KEYS,
    ),
    Format(
        "messages with a label",
        "`messages` or `conversations`, `label` or `kto_tag` (`true` or `false`) of the last answer: ms-swift's, "
        "LLaMA-Factory's",
        "unpaired",
        _OF_MESSAGES | {"messages", "conversations", "weight", *readers.LABELS},
        _any(*(_has(column, label) for column in ("messages", "conversations") for label in readers.LABELS)),
        readers.read_labelled_chat,
    ),
    Format(
        "messages with rejected_response",
        "`messages` that end with the better answer, `rejected_response`: ms-swift's",
        "pairs",
        _CHAT_PAIR_KEYS | {"rejected_response"},
        _has("messages", "rejected_response"),
        readers.read_rejected_response,
    ),
    Format(
        "messages with rejected_messages",
        "`messages`, `rejected_messages` that first differ in an answer: ms-swift's",
        "pairs",
        _CHAT_PAIR_KEYS | {"rejected_messages"},
        _has("messages", "rejected_messages"),
        readers.read_rejected_messages,
    ),
    Format(
        "ShareGPT",
        "`conversations`; every answer in it whose `weight` is not 0 is learned",
        "demonstrations",
        _OF_MESSAGES | {"conversations"},
        _has("conversations"),
        partial(readers.read_chat, column="conversations"),
    ),
    Format(
        "OpenAI chat",
        "`messages`; every assistant message whose `weight` is not 0 is learned",
        "demonstrations",
        _OF_MESSAGES | {"messages"},
        _has("messages"),
        readers.read_chat,
    ),
)


def table() -> str:
    """The formats in Markdown, in the order in which a row is held against them."""
    lines = [f"| {form.name} | {form.row} | {form.kind} |" for form in FORMATS]
    return "\n".join(["| format | row | holds |", "|---|---|---|", *lines])
