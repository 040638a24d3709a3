"""Writes a group (a prompt with its completions) as the texts that the model reads. The chat template gives these texts
their form.

If the template leaves out a part of a group, the group is refused, because training would otherwise lose text
unnoticed.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import date
from functools import cache, lru_cache, partial
from itertools import groupby, islice
from os.path import commonprefix
from typing import TYPE_CHECKING, cast

from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow
from dpo_core.data.messages import THOUGHTS, Message, Text
from dpo_core.data.tools import Tool
from dpo_core.encoding.deadline import deadline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "pangolin"
_THINK = re.compile("</?think>")
_WORD = re.compile(r"\w+")
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag of transformers, which changes no text
_TAG = re.compile(r"<[^<>]*>|\[[^][]*\]")
RENDER_SECONDS = 10.0  # processor time for one call with many groups, of which templates need milliseconds
DROPS_CALLS = "the chat template leaves out tool calls, or a part of them; use a chat template that writes tool calls."
SHOWN = 40  # the most characters of a lost text in an error

Spans = tuple[tuple[int, int], ...]
"""Ranges [start, stop) in ascending order. No range is empty, and no two ranges touch."""


class UnusableTemplate(ValueError):
    """Raised if a chat template cannot be used for any row: the template is missing, or rendering takes too long."""


@dataclass(frozen=True)
class WrittenGroup:
    """The texts of a group (a prompt with its completions), as the model reads them: one of the prompt, and one of each
    completion."""

    prompt: str
    completions: list[str]
    others: tuple[Spans, ...] | None = None  # for each completion, the characters of messages by a tool or a user


def write_groups(
    groups: Sequence[Group], tokenizer: "PreTrainedTokenizerBase", today: date | None
) -> list[WrittenGroup | InvalidRow]:
    """Returns for each group (a prompt with its completions) its texts as the model reads them, or the error of a group
    that the chat template cannot write.

    `today` is the date that some templates write; None means the day on which this process first needed the date. The
    template is called once for all groups. If this call fails, the template is called for each group alone, to find the
    groups that it cannot write.
    """
    line = groups[0].line
    endless = (
        f"The chat template takes more than {RENDER_SECONDS:g} seconds for the row on line {line}; fix the template."
    )
    try:
        with deadline(RENDER_SECONDS, UnusableTemplate(endless)):
            rendered = render(groups, tokenizer, today)
    except Exception as error:  # a template is foreign code and may raise anything
        if len(groups) > 1:
            return [text for group in groups for text in write_groups([group], tokenizer, today)]
        if isinstance(error, UnusableTemplate):
            raise
        if isinstance(error, InvalidRow):
            return [error]
        reason = f"the chat template refuses the messages ({str(error)[:200]}); change the messages or the template."
        return [invalid_group(groups[0], "template_refused", reason)]
    return [_written(group, texts, tokenizer) for group, texts in zip(groups, rendered, strict=True)]


def render(groups: Sequence[Group], tokenizer: "PreTrainedTokenizerBase", today: date | None) -> list["_Rendered"]:
    """Returns for each group (a prompt with its completions) the texts that the chat template writes: the prompt, and
    the prompt followed by each completion. A group of plain texts instead of messages needs no template; its texts are
    returned unchanged. `today` is the date that some templates write; None means the day on which this process first
    needed the date."""
    rendered: list[_Rendered] = []
    for (chat, tools, arguments), neighbours in groupby(groups, key=_template_inputs):
        members = list(neighbours)
        if not chat:
            rendered += (_Rendered(cast(str, g.prompt), cast(tuple[str, ...], g.completions), None) for g in members)
            continue
        if tokenizer.chat_template is None:
            remedy = "give rows with texts instead of messages, or add a chat template to the tokenizer."
            raise UnusableTemplate(f"The tokenizer has no chat template for rows of messages; {remedy}")
        options = {**(arguments or {}), "tools": tools}
        options["strftime_now"] = (today or _first_day()).strftime  # templates ask for the date by this name
        apply = partial(_apply, tokenizer, options)
        prompts = apply([cast(list[Message], group.prompt) for group in members], asks=True)
        dialogues = iter(apply([dialogue for group in members for dialogue in _dialogues(group, tokenizer)]))
        for group, prompt in zip(members, prompts, strict=True):
            texts = tuple(islice(dialogues, len(group.completions)))
            is_prefix = all(text.startswith(prompt) for text in texts)
            bare_prompt = None if is_prefix else apply([cast(list[Message], group.prompt)])[0]
            has_turns = any(len(completion) > 1 for completion in group.completions) or None
            others = has_turns and tuple(map(partial(_others, apply, group), group.completions, texts))
            rendered.append(_Rendered(prompt, texts, bare_prompt, others))
    return rendered


def _others(apply: Callable[..., list[str]], group: Group, completion: Text, dialogue: str) -> Spans:
    """Returns the ranges of characters in `dialogue` that do not come from the assistant: messages of a tool or a user
    between the assistant's answers. `dialogue` is the text of the prompt of `group` (a prompt with its completions),
    followed by `completion`. `apply` is a function that returns the chat template's texts for lists of messages.

    The generation prompt before a later answer (the words with which the template asks for it) counts as a part of
    these ranges, because a served policy is given these words and does not write them. Raises InvalidRow for a template
    that writes a message differently once other messages follow.
    """
    messages = [*cast(list[Message], group.prompt), *cast(list[Message], completion)]
    spans = []
    for stop in range(len(cast(list[Message], group.prompt)) + 1, len(messages)):
        if messages[stop]["role"] != "assistant":
            continue
        begin = max(i for i in range(stop) if messages[i]["role"] == "assistant") + 1
        before, after = apply([messages[:begin], messages[:stop]])
        (asked,) = apply([messages[:stop]], asks=True)
        if not (dialogue.startswith(before) and dialogue.startswith(after)):
            what = "the chat template changes the text of an answer when further messages follow the answer"
            raise invalid_group(group, "template_not_prefix", f"{what}; fix the template.")
        spans.append((len(before), len(_common(asked, [dialogue]))))
    return tuple(spans)


@cache
def _first_day() -> date:
    """Returns the day on which this function was first called. Chat templates that write the date write this day until
    the process ends, even after midnight, so that all rows have the same date."""
    return date.today()


def _template_inputs(group: Group) -> tuple[bool, list[Tool] | None, dict[str, object] | None]:
    """Returns those properties of the group (a prompt with its completions) that all groups must have in common if one
    call of the chat template writes them. Returns three values:

    - whether the group holds messages, and not plain texts
    - its tools; None without tools
    - its arguments for the chat template; None without arguments
    """
    return isinstance(group.prompt, list), group.tools, group.template_arguments


@dataclass(frozen=True)
class _Rendered:
    """The texts of a group (a prompt with its completions) as the chat template writes them: its prompt, and for each
    completion one text in which the prompt and the completion are not yet separated."""

    prompt: str  # the prompt as a served policy is given it, with the words that ask for an answer
    dialogues: tuple[str, ...]  # for each completion, the prompt and it; in a group of texts, only the completion
    bare_prompt: str | None  # `prompt` without words that ask for an answer; None: dialogues begin with `prompt`
    others: tuple[Spans, ...] | None = None  # for each dialogue, the characters of messages by a tool or a user


def _apply(
    tokenizer: "PreTrainedTokenizerBase",
    options: Mapping[str, object],
    dialogues: Sequence[Sequence[Message]],
    *,
    asks: bool = False,
) -> list[str]:
    """Returns the text that the chat template writes for each dialogue (a list of messages). `options` are arguments of
    the template, such as its tools. With `asks`, each text ends with the generation prompt, the words with which the
    template asks for an answer.

    The template gets a message's thoughts (its reasoning) under each key that any template reads. If the template reads
    only lists of parts, it gets a message's content as a list with one part.
    """
    in_parts = _takes_parts(tokenizer)
    inputs = [[_template_message(message, in_parts=in_parts) for message in messages] for messages in dialogues]
    texts = tokenizer.apply_chat_template(
        inputs,
        tokenize=False,
        add_generation_prompt=asks,
        **options,
    )
    return cast(list[str], texts)


def _template_message(message: Message, *, in_parts: bool) -> Mapping[str, object]:
    """Returns the message in the form that a chat template reads. If the message has thoughts (its reasoning), the
    result has them under several keys, because different templates read different keys. With `in_parts`, the content
    of the message is a list of parts."""
    if "reasoning_content" not in message and not in_parts:
        return message
    fields: dict[str, object] = {**message}
    if "reasoning_content" in message:
        fields |= dict.fromkeys(THOUGHTS, message["reasoning_content"])
    if in_parts:
        fields["content"] = [{"type": "text", "text": message["content"]}]
    return fields


@lru_cache(maxsize=8)
def prefill(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns the words, such as `<think>`, that the chat template writes when it asks for an answer, but not before an
    answer that is already there. Returns an empty text if there are no such words."""
    question: list[Message] = [{"role": "user", "content": _PROBE}]
    try:
        apply = partial(_apply, tokenizer, {})
        (asked,), (dialogue,) = (
            apply([question], asks=True),
            apply([[*question, {"role": "assistant", "content": _PROBE}]]),
        )
    except Exception:  # a template is foreign code and may raise anything
        return ""
    return asked.removeprefix(_common(asked, [dialogue]))


@lru_cache(maxsize=8)
def variables(template: str) -> frozenset[str]:
    """Returns the names of all variables that a chat template reads."""
    from jinja2 import Environment, meta

    parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    return frozenset(meta.find_undeclared_variables(parsed))


@lru_cache(maxsize=8)
def _takes_parts(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer's chat template writes a message's content only if it is a list of parts, and not if it is
    a text."""

    def writes(content: object) -> bool:
        try:
            return _PROBE in cast(
                str, tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            )
        except UnusableTemplate:  # the template computes for too long
            raise
        except Exception:  # a template is foreign code and may raise anything
            return False

    return not writes(_PROBE) and writes([{"type": "text", "text": _PROBE}])


def _dialogues(group: Group, tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[Message]]:
    """Yields for each completion of the group (a prompt with its completions) a list of messages: those of the prompt,
    then those of the completion. Removes an EOS token at the end of the completion, because the chat template writes
    its own."""
    eos = tokenizer.eos_token
    for completion in group.completions:
        assert isinstance(group.prompt, list)
        assert isinstance(completion, list)
        *before, last = completion
        if eos and last["content"].endswith(eos):
            last = {**last, "content": last["content"].removesuffix(eos)}
        yield [*group.prompt, *before, last]


def _written(group: Group, rendered: _Rendered, tokenizer: "PreTrainedTokenizerBase") -> WrittenGroup | InvalidRow:
    """Returns the texts of a group (a prompt with its completions) as the model reads them. They are made from
    `rendered`, the texts that the chat template wrote. Returns an error if the template left out a part of the group.

    If the group has texts and not messages, each completion gets one EOS token at its end. The prompt gets a BOS token
    at its start if the tokenizer adds one. In a group with messages the template writes both tokens.
    """
    if isinstance(group.prompt, str):
        eos = tokenizer.eos_token or ""
        texts = [text if text.endswith(eos) else text + eos for text in rendered.dialogues]
        return WrittenGroup(_with_bos(rendered.prompt, tokenizer), texts)
    written = _taken_apart(group, rendered)
    if isinstance(written, InvalidRow):
        return written
    if lost := _lost(group, written, tokenizer):
        return lost
    if rendered.others is None:
        return written
    starts = [len(dialogue) - len(text) for dialogue, text in zip(rendered.dialogues, written.completions, strict=True)]
    others = tuple(
        tuple((begin - start, stop - start) for begin, stop in spans)
        for start, spans in zip(starts, rendered.others, strict=True)
    )
    return replace(written, others=others)


def _taken_apart(group: Group, rendered: _Rendered) -> WrittenGroup | InvalidRow:
    """Cuts the texts in `rendered`, which the chat template wrote for a group (a prompt with its completions), into the
    prompt and the completions. Returns an error if the template writes the prompt differently when an answer follows.

    The words with which the template asks for an answer (the generation prompt) belong to the prompt if all completions
    begin with them. If the completions begin with only a part of these words, only this part belongs to the prompt.
    """
    prompt, dialogues = rendered.prompt, rendered.dialogues
    if rendered.bare_prompt is None:
        return WrittenGroup(prompt, [dialogue[len(prompt) :] for dialogue in dialogues])
    if all(dialogue.startswith(rendered.bare_prompt) for dialogue in dialogues):
        # The words that ask for an answer, such as <think>, are not in these dialogues.
        prompt = _common(prompt, dialogues)
        return WrittenGroup(prompt, [dialogue[len(prompt) :] for dialogue in dialogues])
    last = cast(list[Message], group.prompt)[-1]["content"].strip()
    end = prompt[prompt.rfind(last) :]  # the last message, and the words that ask for an answer
    if last and last in prompt and all(end in dialogue for dialogue in dialogues):
        # The template moves earlier text, such as the system prompt, once an answer follows.
        return WrittenGroup(prompt, [dialogue[dialogue.rfind(end) + len(end) :] for dialogue in dialogues])
    place = len(commonprefix([prompt, *dialogues]))  # noqa: RUF071 (characters are meant)
    other = next(dialogue for dialogue in dialogues if not dialogue.startswith(prompt))
    what = (
        "the chat template changes the text of the prompt when an answer follows: "
        f"{prompt[place : place + SHOWN]!r} becomes {other[place : place + SHOWN]!r}; fix the template."
    )
    return invalid_group(group, "template_not_prefix", what)


def _common(asked: str, dialogues: Sequence[str]) -> str:
    """Returns the longest common beginning of `asked`, the text of a prompt, and all `dialogues`. If this beginning
    would end within a tag of the prompt, such as after the `<` of `<think>`, the whole tag is left out."""
    common = commonprefix([asked, *dialogues])  # noqa: RUF071 (characters are meant)
    half = next((tag for tag in _TAG.finditer(asked) if tag.start() < len(common) < tag.end()), None)
    return common[: half.start()] if half else common


def _lost(group: Group, written: WrittenGroup, tokenizer: "PreTrainedTokenizerBase") -> InvalidRow | None:
    """Returns an error for the first part of the group (a prompt with its completions) that the template leaves out;
    None if the template writes everything. `written` has the texts that the template wrote for the group.

    Thoughts (the reasoning) in the prompt's own answers may be missing, because the template also leaves them out when
    the policy is served.
    """
    prompt = cast(list[Message], group.prompt)
    unread = group.tools and "tools" not in variables(tokenizer.get_chat_template(None, group.tools))
    for tool in group.tools or ():
        function = cast(dict[str, object], tool["function"])
        if unread or _lacks_tool(function, written.prompt):
            name = cast(str, function["name"])[:SHOWN]
            what = (
                f"the chat template leaves out the tool {name!r} or a part of it; "
                "use a chat template that writes tools."
            )
            return invalid_group(group, "template_drops_tools", what)
    contents = [_required_text(message) for message in prompt]
    all_contents = "\0".join(contents)  # no message contains the separator
    for index, (message, content) in enumerate(zip(prompt, contents, strict=True)):
        lost = _first_lost(content, written.prompt, tokenizer)
        if not lost and (often := all_contents.count(content)) > 1 and 0 < written.prompt.count(content) < often:
            lost = content  # the text that was found belongs to another message
        if lost:
            return _drops(group, "text", f"message {index + 1} of the prompt, by {message['role']}", lost)
        if _lacks_calls(message, written.prompt):
            return invalid_group(group, "template_drops_calls", DROPS_CALLS)
    for text, completion in zip(written.completions, cast(tuple[list[Message], ...], group.completions), strict=True):
        answered = prefill(tokenizer) + text  # the prompt may end with words of the answer
        for message in completion:
            if _lacks_calls(message, text):
                return invalid_group(group, "template_drops_calls", DROPS_CALLS)
            if lost := _first_lost(message["content"], answered, tokenizer):
                return _drops(group, "text", "a completion", lost)
            if lost := _first_lost(message.get("reasoning_content", ""), text, tokenizer):
                return _drops(group, "thoughts", "a completion", lost)
    return None


def _required_text(message: Message) -> str:
    """Returns the text that the chat template must write for a message of the prompt. For a message of the assistant,
    the text is the message's content without thoughts (the reasoning before the answer). For any other message, the
    text is the whole content."""
    content = message["content"]
    return (content.rpartition("</think>")[2] if message["role"] == "assistant" else content).strip()


def _lacks_tool(function: Mapping[str, object], text: str) -> bool:
    """Whether `text` lacks a part of the tool `function`: its name, a word of its description, or a word of its
    parameters' names."""
    properties = cast(dict[str, object], function.get("parameters") or {}).get("properties")
    phrases = [str(function.get("description") or ""), *(properties if isinstance(properties, dict) else ())]
    lost = any(phrase not in text and _lacks_a_word(set(_words(phrase)), text) for phrase in phrases)
    return lost or str(function["name"]) not in text


def _lacks_calls(message: Message, text: str) -> bool:
    """Whether `text` lacks a part of the tool calls in the message: a word of a tool's name, of the name of an
    argument, or of an argument's value. Numbers count as words."""
    return _lacks_a_word({word for call in message.get("tool_calls", ()) for word in _words(call["function"])}, text)


def _lacks_a_word(words: Set[str], text: str) -> bool:
    return any(word not in text and json.dumps(word)[1:-1] not in text for word in words)


def _words(value: object) -> Iterator[str]:
    """Yields the words and numbers in a JSON value, also in nested lists and dictionaries. Leaves out the keys `name`
    and `arguments`, which every tool call has."""
    if isinstance(value, str):
        yield from _WORD.findall(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, list):
        for item in value:
            yield from _words(item)
    elif isinstance(value, dict):
        yield from _words([*(value.keys() - {"name", "arguments"}), *value.values()])


def _drops(group: Group, what: str, where: str, lost: str) -> InvalidRow:
    problem = f"the chat template leaves out or changes {what} of {where}: {lost[:SHOWN]!r}"
    sentence = f"{problem}; use a chat template that writes it unchanged."
    return invalid_group(group, f"template_drops_{what}", sentence)


def _first_lost(content: str, text: str, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Returns the first part of `content` that `text` lacks; None if it lacks nothing. The tags <think> and </think>
    separate `content` into parts.

    Chat templates may change spaces around thoughts (the text between the tags) and at both ends, so such spaces are
    ignored.
    """
    if content in text:
        return None
    for part in _THINK.split(content.removesuffix(tokenizer.eos_token or "")):
        if part.strip() not in text and " ".join(part.split()) not in " ".join(text.split()):
            return part.strip()
    return None


def _with_bos(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns the prompt with the BOS token at its start, if the tokenizer adds one. A prompt that already begins with
    BOS is returned unchanged."""
    bos = tokenizer.bos_token
    return prompt if not _wants_bos(tokenizer) or prompt.startswith(bos) else bos + prompt


@lru_cache(maxsize=8)
def _wants_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return tokenizer.bos_token is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def invalid_group(group: Group, code: str, what: str) -> InvalidRow:
    return InvalidRow(group.line, "", code, f"Line {group.line}: {what}")
