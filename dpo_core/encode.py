"""Text becomes token ids, prompt and completions apart, once and for all."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from dpo_core.deadline import deadline
from dpo_core.formats import Group
from dpo_core.jsonl import InvalidRow
from dpo_core.messages import Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_SECONDS = 10.0  # of processor time, for one group: templates take milliseconds
MOST_TAILS = 1024  # remembered ends of prompts: most rows of a file share one


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

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.completion_ids or not all(map(len, self.completion_ids)):
            raise ValueError(f"Line {self.line} has a prompt or a completion of no tokens; give it some.")
        for name in ("ref_logps", "ref_head_logps", "ratings"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.completion_ids):
                many = f"{len(values)} {name} for {len(self.completion_ids)} completions"
                raise ValueError(f"Line {self.line} has {many}; give each completion one.")

    @property
    def head_length(self) -> int:
        """Tokens of the shortest completion."""
        return min(map(len, self.completion_ids))

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


def encode_groups(groups: Sequence[Group], tokenizer: "PreTrainedTokenizerBase") -> Iterator[EncodedGroup | InvalidRow]:
    """Each group's ids in turn, or why it has none. Raises UnusableTemplate.

    The tokenizer is called for all of them together, and reads each prompt once.
    """
    written = [_write(group, tokenizer) for group in groups]
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
        yield _encoded(group, prompt_ids, completion_ids)


def _encoded(
    group: Group, prompt_ids: Sequence[int], completion_ids: tuple[Sequence[int], ...]
) -> EncodedGroup | InvalidRow:
    if not prompt_ids:
        return _invalid(group, "empty_prompt", "the prompt has no tokens; give it some text.")
    if not all(completion_ids):
        return _invalid(group, "empty_completion", "a completion has no tokens; give it some text.")
    ratings, weight, margin = group.ratings, group.weight, group.margin
    return EncodedGroup(prompt_ids, completion_ids, None, group.line, ratings=ratings, weight=weight, margin=margin)


# --- texts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Written:
    """A group in the words of the model."""

    prompt: str
    completions: list[str]


def _write(group: Group, tokenizer: "PreTrainedTokenizerBase") -> _Written | InvalidRow:
    endless = f"The chat template computes on line {group.line} for more than {RENDER_SECONDS:g} seconds; mend it."
    try:
        with deadline(RENDER_SECONDS, UnusableTemplate(endless)):
            if isinstance(group.prompt, str):
                prompt = _with_bos(group.prompt, tokenizer)
            else:
                prompt = _render(group, group.prompt, tokenizer)
            return _Written(prompt, [_completion(group, prompt, text, tokenizer) for text in group.completions])
    except InvalidRow as error:
        return error


def _completion(group: Group, prompt: str, completion: Text, tokenizer: "PreTrainedTokenizerBase") -> str:
    """What follows the prompt. It ends with one EOS: the text's own, or ours; a template writes its own."""
    eos = tokenizer.eos_token or ""
    if isinstance(completion, str):
        return completion if completion.endswith(eos) else completion + eos
    assert isinstance(group.prompt, list)
    *before, last = completion
    if eos and last["content"].endswith(eos):
        last = {**last, "content": last["content"].removesuffix(eos)}
    whole = _render(group, [*group.prompt, *before, last], tokenizer)
    if not whole.startswith(prompt):
        what = "the chat template renders the prompt differently once the completion follows; fix the template."
        raise _invalid(group, "template_not_prefix", what)
    text = whole[len(prompt) :]
    if any(call["function"]["name"] not in text for call in last.get("tool_calls", ())):
        raise _invalid(group, "template_drops_calls", "the chat template leaves tool calls out; use one that has them.")
    return text


def _render(group: Group, messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> str:
    if tokenizer.chat_template is None:
        raise UnusableTemplate("The tokenizer has no chat template; send texts instead of messages, or add a template.")
    try:
        return cast(
            str,
            tokenizer.apply_chat_template(
                messages, tools=group.tools, tokenize=False, add_generation_prompt=messages is group.prompt
            ),
        )
    except UnusableTemplate:
        raise
    except Exception as error:  # a template is a stranger's program, and fails in every way
        reason = f"the chat template refuses the messages: {str(error)[:200]}."
        raise _invalid(group, "template_refused", reason) from None


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


def _ids(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return cast(list[list[int]], tokenizer(texts, **options).input_ids)
