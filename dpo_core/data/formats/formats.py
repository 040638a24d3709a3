"""Lists the formats in which preference data are published, and finds the format of a row. Uses only the standard
library.

The keys of a row and the types of their values decide the row's format. The text of a value matters only if it begins
with `\\n\\nHuman:`, as a dialogue does, or with `[{`, as messages in JSON do. Columns that a format does not read are
usually ignored. If the name of such a column suggests contents that a model should learn from, the row is refused, and
the error names the column.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property, partial

from dpo_core.data.formats import published, readers
from dpo_core.data.formats.column_hints import (
    SYSTEM_KEYS,
    TEMPLATE_KEYS,
    is_media,
    likely_columns,
    role_of,
    says_something,
)
from dpo_core.data.formats.extras import (
    as_chat,
    is_said,
    positive_number,
    refuse_named_answers,
    system_prompt,
    template_arguments,
    with_system,
)
from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow, Row, pointer_to
from dpo_core.data.messages import opened
from dpo_core.data.tools import TOOL_KEYS, refuse_filled, tools_of
from dpo_core.data.values import says_nothing
from dpo_core.options import Kind


@dataclass(frozen=True)
class Format:
    """A format of rows. `matches` returns whether a row (as a dictionary) has the format, and `reader` is a function
    that turns a row into groups. A group is a prompt with its completions."""

    name: str
    row: str  # the columns of a row, in Markdown
    kind: Kind
    keys: frozenset[str]  # the columns that are read
    matches: Callable[[dict[str, object]], bool]
    reader: Callable[[Row], Iterator[Group]]
    joins: bool = False  # True: a row rates one answer, and neighbouring rows of one prompt become one group

    def unread(self, row: Row) -> frozenset[str]:
        """Returns the columns of the row that this format does not read."""
        return frozenset(row.value.keys() - self.keys)

    def read(self, row: Row, unread: Set[str]) -> list[Group]:
        """Returns the groups (prompts with their completions) of the row.

        `unread` are the columns that this format does not read. Raises InvalidRow if the row cannot be read, or if one
        of these columns holds something that the model should learn from.
        """
        telling = unread and list(filter(says_something, unread))
        is_plain = not telling and self._extras.isdisjoint(row.value)  # true for most rows
        groups = list(self.reader(row) if is_plain else self._read_all(row, sorted(telling)))
        if groups and (last := groups[-1]).tools:  # the last group of a chat holds all its messages
            for part in (last.prompt, *last.completions):
                for message in part if isinstance(part, list) else ():
                    refuse_filled(row, last.tools, message.get("tool_calls", ()))
        for group in groups if unread else ():
            refuse_named_answers(row, unread, group)
        return groups

    def _read_all(self, row: Row, unread: Sequence[str]) -> Iterator[Group]:
        """Yields the groups (prompts with their completions) of the row, with the row's system prompt, tools, template
        arguments, weight and margin in them.

        `unread` are the columns that this format does not read. Raises InvalidRow if one of them has contents that the
        groups do not contain.
        """
        weight, margin = (positive_number(row, name) if name in self.keys else None for name in ("weight", "margin"))
        tools = tools_of(row, "", row.value) if self._takes_tools else None
        arguments = template_arguments(row) if self._takes_arguments else None
        system = system_prompt(row) if self._takes_system else None
        groups = list(self.reader(row))
        if system:
            groups = [with_system(row, group, system) for group in groups]
        self._refuse_unread(row, unread, groups)
        for group in groups:
            if isinstance(group.prompt, str) and (tools or arguments):
                key = "tools" if tools else "chat_template_kwargs"
                raise row.invalid(
                    f"/{key}",
                    "unsupported",
                    "can be used only with a prompt that is a list of messages; write the prompt as messages.",
                )
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
    def _extras(self) -> frozenset[str]:
        """The names of the optional columns, such as `weight`, `margin` and `tools`, that rows of this format may have.
        The method `_read_all` reads the optional columns, and the function `reader` reads the format's other
        columns."""
        return self.keys & (OPTIONAL_KEYS | {"weight", "margin"})

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
        """Raises InvalidRow for the first column in `unread` whose contents do not occur in the groups (prompts with
        their completions) of the row. `unread` are the columns that this format does not read. Accepts empty columns.
        Also accepts the value false, except in a column that seems to be a label."""
        for key in unread:
            value = row.value[key]
            if says_nothing(value) or (value is False and role_of(key) != "label") or is_said(value, groups):
                continue
            if is_media(key):
                what = (
                    "holds images, sound or video, which are not supported: models see texts only. "
                    "Remove it to train on the texts."
                )
                raise row.invalid(pointer_to((key,)), "unsupported", what)
            role = role_of(key)
            remedy = _roles_remedy(row, {role: key} if role and role not in row.value else {}) or "rename the column"
            what = f"has contents that the format {self.name} does not read; {remedy}, or remove the column."
            raise row.invalid(pointer_to((key,)), "unread_column", what)


_JSON_STARTS = "[{ \n"  # the first character of messages as JSON


def detect(row: Row, formats: Sequence[Format] | None = None) -> Format:
    """Returns the first of `formats` that matches the row. If `formats` is None, the formats of training data are
    tried. Raises InvalidRow if no format matches.

    The function also changes the row: if a column holds messages as a text of JSON, the text becomes a list of
    messages.
    """
    for column in CONVERSATION_KEYS.intersection(row.value):
        if isinstance(text := row.value[column], str) and text[:1] in _JSON_STARTS:
            row.value[column] = opened(row, f"/{column}", text)
    for form in FORMATS if formats is None else formats:
        if form.matches(row.value):
            return form
    what = f"has columns ({keys_of(row)}) of no known format; docs/use/data.md lists the formats"
    remedy = "say with the option `columns` which column is the prompt, which the chosen answer, and so on"
    likely = _roles_remedy(row, likely_columns(row.value.keys()))
    raise row.invalid("", "unknown_format", f"{what}. Rename the columns, or {likely or remedy}.")


def _roles_remedy(row: Row, columns: Mapping[str, str]) -> str | None:
    """Returns advice for the end of an error message: which of the row's columns the user should name with the option
    `columns`, and for which roles. A role, such as `prompt`, says what a column holds.

    The parameter `columns` holds the likely column of each role. Returns None if no column is likely, or if the row
    could not be read even with these columns.
    """
    if not columns or not ROLES.issuperset(columns):
        return None
    try:
        renamed = row.renamed(columns)
        form = detect(renamed)
        form.read(renamed, form.unread(renamed))
    except InvalidRow:
        return None
    named = ", ".join(f"{role}={key}" for role, key in columns.items())
    return f"say with the option `columns` which column has which role: {named}"


def keys_of(row: Row) -> str:
    """Returns the names of the row's first columns for an error message; "none" if the row has no columns."""
    return ", ".join(key[:40] for key in sorted(row.value)[:10]) or "none"


# --- the table ----------------------------------------------------------------------------------------

_OUTPUT_KEYS = frozenset(
    f"{side}_{word}" for side in ("preferred", "non_preferred") for word in ("output", "completion")
)
OPTIONAL_KEYS = TOOL_KEYS | TEMPLATE_KEYS | SYSTEM_KEYS
_SIDES_KEYS = frozenset({*readers.SIDES, "weight", "margin"})
_PAIR_KEYS = _SIDES_KEYS | OPTIONAL_KEYS | {"prompt"}
_RANKED_KEYS = OPTIONAL_KEYS | {"prompt", "completions", "ranks", "scores", "weight"}
_LABEL_KEYS = OPTIONAL_KEYS | {"prompt", "completion", "label", "weight"}
_CHAT_PAIR_KEYS = OPTIONAL_KEYS | {"messages", "weight", "margin"}
CONVERSATION_KEYS = frozenset(
    {*readers.SIDES, "prompt", "completion", "messages", "conversations", "context", "rejected_messages"}
    | {"conversation_a", "conversation_b"}
)

# The standard names that the option `columns` may use: the keys of the formats that belong to no public data set.
ROLES = (_PAIR_KEYS | _LABEL_KEYS | _RANKED_KEYS | {"messages"}) - {"functions", "parallel_tool_calls", "system_prompt"}

Test = Callable[[dict[str, object]], bool]


def _is_dialogues(row: dict[str, object]) -> bool:
    """Whether `chosen` and `rejected` of a row are dialogues, each written in one text, as in the data set HH-RLHF."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    return (
        isinstance(chosen, str)
        and chosen.startswith("\n\nHuman:")
        and isinstance(rejected, str)
        and rejected.startswith("\n\nHuman:")
    )


def _answers_a_prompt(row: dict[str, object]) -> bool:
    """Whether the row has a prompt and a chosen answer, and at least one of the two is given as messages. False if the
    chosen answer repeats the prompt at its beginning."""
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
    """Whether the row seems to have OpenAI's preference format. Such a row has the key `input`. Besides, `input` holds
    a dictionary, or the row has a key such as `preferred_output`, or `input` is its only key."""
    return "input" in row and (
        isinstance(row["input"], dict) or not _OUTPUT_KEYS.isdisjoint(row) or row.keys() == {"input"}
    )


def _has(*keys: str, **kinds: type) -> Test:
    """Returns a test (a function of a row). The test is true if the row has all `keys`, and a value of the given type
    for each name in `kinds`."""
    wanted = {*keys, *kinds}
    if not kinds:
        return wanted.issubset
    return lambda row: row.keys() >= wanted and all(isinstance(row[key], kind) for key, kind in kinds.items())


def _any(*tests: Test) -> Test:
    """Returns a test (a function of a row). The test is true if at least one of `tests` is true."""
    return lambda row: any(test(row) for test in tests)


def _beside_messages(**kinds: type) -> Test:
    """Returns a test (a function of a row). The test is true if the row has a conversation in `messages` or
    `conversations`, and a value of the given type for each name in `kinds`."""
    return _any(_has(messages=list, **kinds), _has(conversations=list, **kinds))


def _published(name: str, reader: published.Reader, columns: str, kind: Kind = "pairs") -> Format:
    """Returns the format of a public data set. Its rows must have all of `columns` (names, with spaces between them),
    and may have a system prompt, arguments of the chat template, and a weight. `reader` turns a row into groups
    (prompts with their completions), and `kind` names the kind of feedback in the rows, such as pairs."""
    keys = columns.split()
    row = ", ".join(f"`{key}`" for key in keys)
    return Format(name, row, kind, frozenset(keys) | SYSTEM_KEYS | TEMPLATE_KEYS | {"weight"}, _has(*keys), reader)


def _pairs_of(name: str, prompt: str, chosen: str, rejected: str) -> Format:
    """Returns a format for rows with a prompt, a chosen answer and a rejected answer, in the columns that `prompt`,
    `chosen` and `rejected` name."""
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


def with_system_prompt(form: Format) -> Format:
    """Returns a format for rows that match the format `form` and also have a system prompt. In these rows, texts of
    prompts and answers are read as messages."""

    def matches(row: dict[str, object]) -> bool:
        return not SYSTEM_KEYS.isdisjoint(row) and form.matches(row)

    return replace(
        form,
        name=f"system, {form.name}",
        row=f"`system`, {form.row}; read as messages",
        matches=matches,
        reader=as_chat(form.reader),
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
        "`prompt`, `chosen`, `rejected` as messages; a text as `prompt` is the user's words, else the assistant's",
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
    *map(with_system_prompt, _TEXTS),
    _TEXTS[0],
    _pairs_of("question/chosen/rejected", "question", *readers.SIDES),
    _pairs_of("instruction/chosen/rejected", "instruction", *readers.SIDES),
    _pairs_of("input/chosen/rejected", "input", *readers.SIDES),
    _pairs_of("prompt/chosen_response/rejected_response", "prompt", "chosen_response", "rejected_response"),
    _pairs_of("instruction/chosen_response/rejected_response", "instruction", "chosen_response", "rejected_response"),
    _pairs_of("question/response_j/response_k", "question", "response_j", "response_k"),
    Format(
        "chosen/rejected texts that hold their prompt",
        "`chosen`, `rejected`, both with the prompt before the answer: what both begin with is the prompt, "
        "without spaces at the prompt's end",
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
        | OPTIONAL_KEYS - TOOL_KEYS,
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
        OPTIONAL_KEYS | {"messages", "conversations", "weight", *readers.LABELS},
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
        OPTIONAL_KEYS | {"conversations"},
        _has("conversations"),
        partial(readers.read_chat, column="conversations"),
    ),
    Format(
        "OpenAI chat",
        "`messages`; every assistant message whose `weight` is not 0 is learned",
        "demonstrations",
        OPTIONAL_KEYS | {"messages"},
        _has("messages"),
        readers.read_chat,
    ),
)


def table() -> str:
    """Returns a Markdown table of all formats of training data, in the order in which a row is compared with them."""
    lines = [f"| {form.name} | {form.row} | {form.kind} |" for form in FORMATS]
    return "\n".join(["| format | row | holds |", "|---|---|---|", *lines])
