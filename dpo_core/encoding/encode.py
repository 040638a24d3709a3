"""Text becomes token ids, prompt and completions apart, once and for all."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
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
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_PROBE = "pangolin"
_THINK = re.compile("</?think>")
_WORD = re.compile(r"\w+")
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own tag, which changes no text
_TAG = re.compile(r"<[^<>]*>|\[[^][]*\]")
AT_A_TIME = 100  # groups: more are no faster, and take more memory
RENDER_SECONDS = 10.0  # of processor time, for so many groups: templates take milliseconds
DROPS_CALLS = "the chat template leaves tool calls out, or a part of them; use one that has them."
SHOWN = 40  # characters of what a template loses
MOST_TAILS = 1024  # remembered ends of prompts: most rows of a file share one


Spans = tuple[tuple[int, int], ...]
"""[start, stop) of each, in order, apart, and none empty."""


class UnusableTemplate(ValueError):
    """The rows hold messages, and the model does not say how to write them, or never ends to."""


@dataclass(frozen=True)
class EncodedGroup:
    """A group as ids: `prompt_ids + completion_ids[j]` is what the policy reads, completions best first."""

    prompt_ids: Sequence[int]
    completion_ids: tuple[Sequence[int], ...]
    ref_logps: tuple[float, ...] | None  # of each completion, summed, in nats; None: not scored
    line: int
    ref_head_logps: tuple[float, ...] | None = None  # summed over `head_length` tokens
    ratings: tuple[float, ...] | None = None  # higher is better; None: the order says it; nan: of another prompt
    weight: float = 1.0  # of the group's loss
    margin: float | None = None  # by which the chosen completion should lead
    others: tuple[Spans, ...] | None = None  # of each completion, the tokens that are read and not learned
    has_bos: bool = field(default=False, compare=False)  # whether the prompt begins with the tokenizer's BOS

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.completion_ids or not all(map(len, self.completion_ids)):
            raise ValueError(f"Line {self.line} has a prompt or a completion of no tokens; give it some.")
        for name in ("ref_logps", "ref_head_logps", "ratings", "others"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.completion_ids):
                many = f"{len(values)} {name} for {len(self.completion_ids)} completions"
                raise ValueError(f"Line {self.line} has {many}; give each completion one.")

        if self.others is not None and not all(self.num_learned):
            raise ValueError(f"Line {self.line} has a completion of which no token is learned; leave it out.")

    def learned(self, completion: int) -> Sequence[int]:
        """Places in a completion's ids: all, but for what a tool or a user says in it."""
        places = range(len(self.completion_ids[completion]))
        spans = self.others[completion] if self.others else ()
        return [i for i in places if not any(start <= i < stop for start, stop in spans)] if spans else places

    @property
    def num_learned(self) -> list[int]:
        """Tokens of each completion that are learned."""
        lengths = [len(ids) for ids in self.completion_ids]
        if self.others is None:
            return lengths
        said = (sum(stop - start for start, stop in spans) for spans in self.others)
        return [length - spoken for length, spoken in zip(lengths, said, strict=True)]

    @property
    def head_length(self) -> int:
        """Learned tokens of the completion that has the fewest."""
        return min(self.num_learned)

    def ranked(self) -> tuple[float, ...]:
        """A rating for each completion. By order alone the last has 0 and a single one has 1."""
        last = max(1, len(self.completion_ids) - 1)
        return self.ratings or tuple(float(last - place) for place in range(len(self.completion_ids)))

    def rated(self) -> list[float]:
        """The ratings of the prompt's own completions."""
        return [rating for rating in self.ranked() if not math.isnan(rating)]

    @property
    def num_tokens(self) -> int:
        """The prompt once and every completion."""
        return len(self.prompt_ids) + sum(map(len, self.completion_ids))


def encode_group(group: Group, tokenizer: "PreTrainedTokenizerBase") -> EncodedGroup:
    """Raises InvalidRow for a group that the chat template or the tokenizer cannot take apart."""
    (encoded,) = encode_groups([group], tokenizer)
    if isinstance(encoded, InvalidRow):
        raise encoded
    return encoded


def encode_groups(
    groups: Iterable[Group], tokenizer: "PreTrainedTokenizerBase", *, today: date | None = None
) -> Iterator[EncodedGroup | InvalidRow]:
    """Each group's ids in turn, or why it has none. Raises UnusableTemplate.

    `today` is what a template writes that writes the date, as some do; None: the day on which this was first called.
    The template and the tokenizer are called for many of them together, and the tokenizer reads each prompt once.
    """
    groups = iter(groups)
    while some := list(islice(groups, AT_A_TIME)):
        yield from _encode_together(some, tokenizer, today)


def _encode_together(
    groups: Sequence[Group], tokenizer: "PreTrainedTokenizerBase", today: date | None
) -> Iterator[EncodedGroup | InvalidRow]:
    written = _write(groups, tokenizer, today)
    texts = [text for text in written if isinstance(text, _Written)]
    prompts = _ids([text.prompt for text in texts], tokenizer)
    tails = [_tail(text.prompt, ids, tokenizer) for text, ids in zip(texts, prompts, strict=True)]
    behind = [
        tail.text + completion for text, tail in zip(texts, tails, strict=True) for completion in text.completions
    ]
    wholes = iter(_ids(behind, tokenizer))
    ready = zip(texts, prompts, tails, strict=True)
    for group, text in zip(groups, written, strict=True):
        if isinstance(text, InvalidRow):
            yield text
            continue
        _, prompt_ids, tail = next(ready)
        completion_ids = tuple(
            _behind(tail.ids, next(wholes), completion, tokenizer) for completion in text.completions
        )
        others = text.others and tuple(
            tuple(_tokens_of(span, completion, ids, tail, tokenizer) for span in spans)
            for spans, completion, ids in zip(text.others, text.completions, completion_ids, strict=True)
        )
        yield _encoded(group, prompt_ids, completion_ids, others, tokenizer.bos_token_id)


def _encoded(
    group: Group,
    prompt_ids: Sequence[int],
    completion_ids: tuple[Sequence[int], ...],
    others: tuple[Spans, ...] | None,
    bos: int | None,
) -> EncodedGroup | InvalidRow:
    if not prompt_ids:
        return _invalid(group, "empty_prompt", "the prompt has no tokens; give it some text.")
    if not all(completion_ids):
        return _invalid(group, "empty_completion", "a completion has no tokens; give it some text.")
    return EncodedGroup(
        prompt_ids,
        completion_ids,
        None,
        group.line,
        ratings=group.ratings,
        weight=group.weight,
        margin=group.margin,
        others=others,
        has_bos=prompt_ids[0] == bos,
    )


# --- texts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Written:
    """A group in the words of the model."""

    prompt: str
    completions: list[str]
    others: tuple[Spans, ...] | None = None  # of each completion, the characters that a tool or a user says


def _write(
    groups: Sequence[Group], tokenizer: "PreTrainedTokenizerBase", today: date | None
) -> list[_Written | InvalidRow]:
    """Where the template fails for all of them together, it is called for each alone, to tell whose fault it is."""
    line = groups[0].line
    endless = f"The chat template computes on line {line} for more than {RENDER_SECONDS:g} seconds; mend it."
    try:
        with deadline(RENDER_SECONDS, UnusableTemplate(endless)):
            rendered = render(groups, tokenizer, today)
    except Exception as error:  # a template is a stranger's program, and fails in every way
        if len(groups) > 1:
            return [text for group in groups for text in _write([group], tokenizer, today)]
        if isinstance(error, UnusableTemplate):
            raise
        if isinstance(error, InvalidRow):
            return [error]
        reason = f"the chat template refuses the messages: {str(error)[:200]}."
        return [_invalid(groups[0], "template_refused", reason)]
    return [_written(group, found, tokenizer) for group, found in zip(groups, rendered, strict=True)]


def render(groups: Sequence[Group], tokenizer: "PreTrainedTokenizerBase", today: date | None) -> list["_Rendered"]:
    """Of each group, as the template writes them: its prompt, and the prompt with each completion."""
    rendered: list[_Rendered] = []
    for (chat, tools, arguments), alike in groupby(groups, key=_for_the_template):
        some = list(alike)
        if not chat:
            rendered += (_Rendered(cast(str, g.prompt), cast(tuple[str, ...], g.completions), None) for g in some)
            continue
        if tokenizer.chat_template is None:
            remedy = "send texts instead of messages, or add a template."
            raise UnusableTemplate(f"The tokenizer has no chat template; {remedy}")
        options = {**(arguments or {}), "tools": tools}
        options["strftime_now"] = (today or _first_day()).strftime  # what templates call for the date
        apply = partial(_apply, tokenizer, options)
        prompts = apply([cast(list[Message], group.prompt) for group in some], asks=True)
        wholes = iter(apply([whole for group in some for whole in _wholes(group, tokenizer)]))
        for group, prompt in zip(some, prompts, strict=True):
            texts = tuple(islice(wholes, len(group.completions)))
            known = all(text.startswith(prompt) for text in texts)
            asked = None if known else apply([cast(list[Message], group.prompt)])[0]
            turns = any(len(completion) > 1 for completion in group.completions) or None
            others = turns and tuple(map(partial(_others, apply, group), group.completions, texts))
            rendered.append(_Rendered(prompt, texts, asked, others))
    return rendered


def _others(apply: Callable[..., list[str]], group: Group, completion: Text, whole: str) -> Spans:
    """Where in the whole a tool or a user speaks behind the prompt: between the assistant's messages.

    What asks for an answer is theirs: the policy finds it there. Raises InvalidRow for a template that writes a
    message differently once others follow.
    """
    messages = [*cast(list[Message], group.prompt), *cast(list[Message], completion)]
    spans = []
    for stop in range(len(cast(list[Message], group.prompt)) + 1, len(messages)):
        if messages[stop]["role"] != "assistant":
            continue
        begin = max(i for i in range(stop) if messages[i]["role"] == "assistant") + 1
        said, heard = apply([messages[:begin], messages[:stop]])
        (asked,) = apply([messages[:stop]], asks=True)
        if not (whole.startswith(said) and whole.startswith(heard)):
            what = "the chat template writes a message of a completion differently once others follow"
            raise _invalid(group, "template_not_prefix", f"{what}; mend the template.")
        spans.append((len(said), len(_common(asked, [whole]))))
    return tuple(spans)


@cache
def _first_day() -> date:
    """The date that templates write in all that this process encodes, also beyond midnight."""
    return date.today()


def _for_the_template(group: Group) -> tuple[bool, list[Tool] | None, dict[str, object] | None]:
    return isinstance(group.prompt, list), group.tools, group.template_arguments


@dataclass(frozen=True)
class _Rendered:
    prompt: str  # as the policy will be asked
    wholes: tuple[str, ...]  # with each completion behind it
    asked: str | None  # the prompt without what asks for an answer; None: the wholes begin with the prompt
    others: tuple[Spans, ...] | None = None  # of each whole, the characters behind the prompt that others say


def _apply(
    tokenizer: "PreTrainedTokenizerBase",
    options: Mapping[str, object],
    conversations: Sequence[Sequence[Message]],
    *,
    asks: bool = False,
) -> list[str]:
    """The texts of conversations, which ask for an answer at their end or do not.

    A template that takes thoughts or parts by another name is given them by that.
    """
    in_parts = _takes_parts(tokenizer)
    given = [[_as_given(message, in_parts=in_parts) for message in messages] for messages in conversations]
    texts = tokenizer.apply_chat_template(
        given,
        tokenize=False,
        add_generation_prompt=asks,
        **options,
    )
    return cast(list[str], texts)


def _as_given(message: Message, *, in_parts: bool) -> Mapping[str, object]:
    if "reasoning_content" not in message and not in_parts:
        return message
    given: dict[str, object] = {**message}
    if "reasoning_content" in message:
        given |= dict.fromkeys(THOUGHTS, message["reasoning_content"])
    if in_parts:
        given["content"] = [{"type": "text", "text": message["content"]}]
    return given


@lru_cache(maxsize=8)
def prefill(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The words with which the chat template begins an answer that it asks for, but none that it writes: `<think>`."""
    question: list[Message] = [{"role": "user", "content": _PROBE}]
    try:
        apply = partial(_apply, tokenizer, {})
        (asked,), (whole,) = (
            apply([question], asks=True),
            apply([[*question, {"role": "assistant", "content": _PROBE}]]),
        )
    except Exception:  # a template is a stranger's program, and fails in every way
        return ""
    return asked.removeprefix(_common(asked, [whole]))


@lru_cache(maxsize=8)
def variables(template: str) -> frozenset[str]:
    """The names of what a chat template is given that it reads anywhere."""
    from jinja2 import Environment, meta

    parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    return frozenset(meta.find_undeclared_variables(parsed))


@lru_cache(maxsize=8)
def _takes_parts(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the template writes the parts of a content, and nothing of a text."""

    def writes(content: object) -> bool:
        try:
            return _PROBE in cast(
                str, tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            )
        except UnusableTemplate:  # it computes for too long
            raise
        except Exception:  # a template is a stranger's program, and fails in every way
            return False

    return not writes(_PROBE) and writes([{"type": "text", "text": _PROBE}])


def _wholes(group: Group, tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[Message]]:
    """The prompt with each completion, without the EOS that the template writes itself."""
    eos = tokenizer.eos_token
    for completion in group.completions:
        assert isinstance(group.prompt, list)
        assert isinstance(completion, list)
        *before, last = completion
        if eos and last["content"].endswith(eos):
            last = {**last, "content": last["content"].removesuffix(eos)}
        yield [*group.prompt, *before, last]


def _written(group: Group, rendered: _Rendered, tokenizer: "PreTrainedTokenizerBase") -> _Written | InvalidRow:
    """Texts end with one EOS, their own or ours, and begin with a BOS likewise; a template writes both itself."""
    if isinstance(group.prompt, str):
        eos = tokenizer.eos_token or ""
        texts = [text if text.endswith(eos) else text + eos for text in rendered.wholes]
        return _Written(_with_bos(rendered.prompt, tokenizer), texts)
    written = _taken_apart(group, rendered)
    if isinstance(written, InvalidRow):
        return written
    if lost := _lost(group, written, tokenizer):
        return lost
    if rendered.others is None:
        return written
    starts = [len(whole) - len(text) for whole, text in zip(rendered.wholes, written.completions, strict=True)]
    others = tuple(
        tuple((begin - start, stop - start) for begin, stop in spans)
        for start, spans in zip(starts, rendered.others, strict=True)
    )
    return replace(written, others=others)


def _taken_apart(group: Group, rendered: _Rendered) -> _Written | InvalidRow:
    """The prompt, as the policy will be asked if that can be, and what the template writes of each completion."""
    prompt, wholes = rendered.prompt, rendered.wholes
    if rendered.asked is None:
        return _Written(prompt, [whole[len(prompt) :] for whole in wholes])
    if all(whole.startswith(rendered.asked) for whole in wholes):
        # It asks for an answer with words that these answers lack, such as <think>.
        prompt = _common(prompt, wholes)
        return _Written(prompt, [whole[len(prompt) :] for whole in wholes])
    last = cast(list[Message], group.prompt)[-1]["content"].strip()
    end = prompt[prompt.rfind(last) :]  # the last message, and what asks for an answer
    if last and last in prompt and all(end in whole for whole in wholes):
        # It writes what stands before, such as the system prompt, elsewhere once an answer follows.
        return _Written(prompt, [whole[whole.rfind(end) + len(end) :] for whole in wholes])
    place = len(commonprefix([prompt, *wholes]))  # noqa: RUF071 (characters are meant)
    other = next(whole for whole in wholes if not whole.startswith(prompt))
    what = (
        "the chat template writes the prompt differently once the completion follows: "
        f"{prompt[place : place + SHOWN]!r} becomes {other[place : place + SHOWN]!r}; mend the template."
    )
    return _invalid(group, "template_not_prefix", what)


def _common(asked: str, wholes: Sequence[str]) -> str:
    """What a question and its answers begin with. Where they part within a tag of the question, such as `<think>`, it
    ends before the tag: the answers may only begin with `<`, too."""
    common = commonprefix([asked, *wholes])  # noqa: RUF071 (characters are meant)
    half = next((tag for tag in _TAG.finditer(asked) if tag.start() < len(common) < tag.end()), None)
    return common[: half.start()] if half else common


def _lost(group: Group, written: _Written, tokenizer: "PreTrainedTokenizerBase") -> InvalidRow | None:
    """What the row says and the template does not write. Earlier answers may lose their thoughts, as when served."""
    prompt = cast(list[Message], group.prompt)
    unread = group.tools and "tools" not in variables(tokenizer.get_chat_template(None, group.tools))
    for tool in group.tools or ():
        function = cast(dict[str, object], tool["function"])
        if unread or _lacks_tool(function, written.prompt):
            name = cast(str, function["name"])[:SHOWN]
            what = f"the chat template leaves out the tool {name!r}, or a part of it; use one that writes tools."
            return _invalid(group, "template_drops_tools", what)
    contents = [_to_be_seen(message) for message in prompt]
    all_contents = "\0".join(contents)  # which no text holds
    for index, (message, content) in enumerate(zip(prompt, contents, strict=True)):
        lost = _first_lost(content, written.prompt, tokenizer)
        if not lost and (often := all_contents.count(content)) > 1 and 0 < written.prompt.count(content) < often:
            lost = content  # it stands in another message
        if lost:
            return _drops(group, "text", f"message {index + 1} of the prompt, by {message['role']}", lost)
        if _lacks_calls(message, written.prompt):
            return _invalid(group, "template_drops_calls", DROPS_CALLS)
    for text, completion in zip(written.completions, cast(tuple[list[Message], ...], group.completions), strict=True):
        answered = prefill(tokenizer) + text  # the prompt may end with words of the answer
        for message in completion:
            if _lacks_calls(message, text):
                return _invalid(group, "template_drops_calls", DROPS_CALLS)
            if lost := _first_lost(message["content"], answered, tokenizer):
                return _drops(group, "text", "a completion", lost)
            if lost := _first_lost(message.get("reasoning_content", ""), text, tokenizer):
                return _drops(group, "thoughts", "a completion", lost)
    return None


def _to_be_seen(message: Message) -> str:
    """What the template must write of a message in the prompt: of an answer, the content without its thoughts."""
    content = message["content"]
    return (content.rpartition("</think>")[2] if message["role"] == "assistant" else content).strip()


def _lacks_tool(function: Mapping[str, object], text: str) -> bool:
    """Whether the text lacks its name, or a word of its description or of its parameters' names."""
    properties = cast(dict[str, object], function.get("parameters") or {}).get("properties")
    said = [str(function.get("description") or ""), *(properties if isinstance(properties, dict) else ())]
    lost = any(each not in text and _lack(set(_words(each)), text) for each in said)
    return lost or str(function["name"]) not in text


def _lacks_calls(message: Message, text: str) -> bool:
    """Whether the text lacks a word of a call: its name, its arguments' names, and the words and numbers of these."""
    return _lack({word for call in message.get("tool_calls", ()) for word in _words(call["function"])}, text)


def _lack(words: Set[str], text: str) -> bool:
    return any(word not in text and json.dumps(word)[1:-1] not in text for word in words)


def _words(value: object) -> Iterator[str]:
    """Of the texts and numbers in it, but for the keys `name` and `arguments` of a function."""
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
    sentence = f"the chat template leaves out or changes {what} of {where}: {lost[:SHOWN]!r}; use one that writes it."
    return _invalid(group, f"template_drops_{what}", sentence)


def _first_lost(content: str, text: str, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A part of the content that the text lacks. Around thoughts and at its ends, templates change the spaces."""
    if content in text:
        return None
    for part in _THINK.split(content.removesuffix(tokenizer.eos_token or "")):
        if part.strip() not in text and " ".join(part.split()) not in " ".join(text.split()):
            return part.strip()
    return None


def _with_bos(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The prompt behind the BOS token, where the tokenizer wants one and the text does not bring it."""
    bos = tokenizer.bos_token
    return prompt if not _wants_bos(tokenizer) or prompt.startswith(bos) else bos + prompt


@lru_cache(maxsize=8)
def _wants_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return tokenizer.bos_token is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def _invalid(group: Group, code: str, what: str) -> InvalidRow:
    return InvalidRow(group.line, "", code, f"Line {group.line}: {what}")


# --- ids -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tail:
    """A prompt's end, in words and ids. What is read behind it is read as behind the whole prompt."""

    text: str
    ids: Sequence[int]


def _tail(prompt: str, ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> _Tail:
    """From the last special token on: tokenizers cut a text there before anything else. Else the whole prompt."""
    markers = _markers(tokenizer)
    place = next((i for i in range(len(ids) - 1, 0, -1) if ids[i] in markers), 0)
    if place:
        text = prompt[prompt.rfind(markers[ids[place]]) :]
        if _few_ids(text, tokenizer) == tuple(ids[place:]):
            return _Tail(text, ids[place:])
    return _Tail(prompt, ids)


@lru_cache(maxsize=8)
def _markers(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    added = tokenizer.added_tokens_decoder.items()
    return {number: token.content for number, token in added if token.special and not token.single_word}


@lru_cache(maxsize=MOST_TAILS)
def _few_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    return tuple(_ids([text], tokenizer)[0])


def _behind(
    tail_ids: Sequence[int], whole: Sequence[int], completion: str, tokenizer: "PreTrainedTokenizerBase"
) -> Sequence[int]:
    """The ids that follow the tail's. Where a token would span the border, the text is encoded by itself,
    as a served policy has only ever the prompt's own ids before it."""
    if whole[: len(tail_ids)] == tail_ids:
        return whole[len(tail_ids) :]
    return _ids([completion], tokenizer)[0]


def _tokens_of(
    span: tuple[int, int], text: str, ids: Sequence[int], tail: _Tail, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, int]:
    """The places among a completion's ids of characters of its text; a token over the border belongs behind it."""
    befores = _ids([tail.text + text[:place] for place in span], tokenizer)
    own = (_behind(tail.ids, before, text[:place], tokenizer) for before, place in zip(befores, span, strict=True))
    start, stop = (len(commonprefix([list(before), list(ids)])) for before in own)  # noqa: RUF071 (ids are meant)
    return start, stop


def _ids(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    if not texts:
        return []
    if not _calls_library(tokenizer):
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return cast(list[list[int]], tokenizer(texts, **options).input_ids)
    library = cast("Tokenizer", tokenizer.backend_tokenizer)
    library.no_truncation()  # this and the next two: what the tokenizer sets at each call
    library.no_padding()
    library.encode_special_tokens = tokenizer.split_special_tokens
    return [found.ids for found in library.encode_batch_fast(texts, add_special_tokens=False)]


@lru_cache(maxsize=8)
def _calls_library(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether its call is nothing but that of `tokenizers`, which is faster without places in the text."""
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(tokenizer)
    own = kind.__call__ is Fast.__call__ and kind._encode_plus is Fast._encode_plus  # some models have their own
    return issubclass(kind, Fast) and own
