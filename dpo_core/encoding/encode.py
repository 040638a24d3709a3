"""Turns groups of texts into token ids, separately for the prompt and each completion. A group is a prompt with its
completions. Each group is encoded only once; everything after the encoding reads only the ids."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from itertools import islice
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, cast

from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow
from dpo_core.encoding.templates import Spans, WrittenGroup, invalid_group, write_groups

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

AT_A_TIME = 100  # groups encoded together; a larger number is no faster and takes more memory
MOST_TAILS = 1024  # ends of prompts whose ids are cached; most rows of a file have the same end


@dataclass(frozen=True)
class EncodedGroup:
    """A group (a prompt with its completions) as token ids. For completion number j the model reads `prompt_ids +
    completion_ids[j]`. Completion 0 is the best. `ref_logps` has the log-probabilities of the completions under the
    reference; it is None until the group is scored."""

    prompt_ids: Sequence[int]
    completion_ids: tuple[Sequence[int], ...]
    ref_logps: tuple[float, ...] | None  # the reference's sums over each completion, in nats; None: not scored
    line: int
    ref_head_logps: tuple[float, ...] | None = None  # the reference's sums over the heads, see `head_length`
    ratings: tuple[float, ...] | None = None  # higher is better; None: only the order counts; nan: of another prompt
    weight: float = 1.0  # of the group's loss
    margin: float | None = None  # by which the chosen completion should lead
    others: tuple[Spans, ...] | None = None  # for each completion, the ranges of tokens that are not learned
    has_bos: bool = field(default=False, compare=False)  # whether the prompt begins with the tokenizer's BOS

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.completion_ids or not all(map(len, self.completion_ids)):
            raise ValueError(
                f"Line {self.line} has a prompt or a completion without tokens; give each of them some text."
            )
        for name in ("ref_logps", "ref_head_logps", "ratings", "others"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.completion_ids):
                counts = f"{len(values)} {name} for {len(self.completion_ids)} completions"
                raise ValueError(f"Line {self.line} has {counts}; give one value for each completion.")
        if self.others is not None and not all(self.num_learned):
            raise ValueError(
                f"Line {self.line} has a completion without any token to learn from; leave the completion out."
            )

    def learned(self, completion: int) -> Sequence[int]:
        """Returns the positions of the tokens in completion number `completion` that count in the loss. Tokens of a
        tool's or a user's messages within the completion do not count."""
        places = range(len(self.completion_ids[completion]))
        spans = self.others[completion] if self.others else ()
        return [i for i in places if not any(start <= i < stop for start, stop in spans)] if spans else places

    @property
    def num_learned(self) -> list[int]:
        """For each completion, the number of its tokens that count in the loss."""
        lengths = [len(ids) for ids in self.completion_ids]
        if self.others is None:
            return lengths
        skipped = (sum(stop - start for start, stop in spans) for spans in self.others)
        return [length - unlearned for length, unlearned in zip(lengths, skipped, strict=True)]

    @property
    def head_length(self) -> int:
        """The number of tokens in the head of each completion. The head of a completion is its first tokens that count
        in the loss. It has as many tokens as the shortest completion of the group (a prompt with its completions), so
        all completions of a group have heads of the same length."""
        return min(self.num_learned)

    def ranked(self) -> tuple[float, ...]:
        """Returns a rating for each completion; a higher rating is better. If the group has no ratings, the order of
        the completions decides: the last completion gets 0, and each earlier one gets 1 more than the completion after
        it. A single completion gets 1."""
        last = max(1, len(self.completion_ids) - 1)
        return self.ratings or tuple(float(last - place) for place in range(len(self.completion_ids)))

    def rated(self) -> list[float]:
        """Returns the ratings of the completions that answer the group's own prompt. A completion that answers the
        prompt of another group (KTO needs such completions) has the rating nan and is left out."""
        return [rating for rating in self.ranked() if not math.isnan(rating)]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the group: its prompt, counted once, and every completion."""
        return len(self.prompt_ids) + sum(map(len, self.completion_ids))


@dataclass(frozen=True)
class Outline(EncodedGroup):
    """A group (a prompt with its completions) whose token ids are not loaded yet. Ranges of the same lengths stand in
    place of the ids.

    An outline is enough to plan which process computes which group. The forward pass needs the ids themselves.
    """

    place: Any = None  # for the function that loads the ids: where they are

    @classmethod
    def of(cls, group: EncodedGroup, place: Any = None) -> "Outline":
        """Returns the outline of a group (a prompt with its completions), which takes less memory than the group.
        `place` says where the token ids are stored, in a form that the function that later loads the ids
        understands."""
        completions = tuple(range(len(ids)) for ids in group.completion_ids)
        lengths = {"prompt_ids": range(len(group.prompt_ids)), "completion_ids": completions, "place": place}
        return cls(**vars(group) | lengths)

    def with_ids(self, prompt_ids: Sequence[int], completion_ids: tuple[Sequence[int], ...]) -> EncodedGroup:
        """Returns the group (a prompt with its completions) that this outline stands for, with the token ids
        `prompt_ids` and `completion_ids` in place of the ranges."""
        known = {name: value for name, value in vars(self).items() if name != "place"}
        return EncodedGroup(**known | {"prompt_ids": prompt_ids, "completion_ids": completion_ids})


def encode_group(group: Group, tokenizer: "PreTrainedTokenizerBase") -> EncodedGroup:
    """Returns the token ids of a group (a prompt with its completions). Raises InvalidRow if the chat template cannot
    write the group or the tokenizer cannot encode it, and UnusableTemplate if the tokenizer has no usable chat
    template."""
    (encoded,) = encode_groups([group], tokenizer)
    if isinstance(encoded, InvalidRow):
        raise encoded
    return encoded


def encode_groups(
    groups: Iterable[Group], tokenizer: "PreTrainedTokenizerBase", *, today: date | None = None
) -> Iterator[EncodedGroup | InvalidRow]:
    """Yields for each group (a prompt with its completions) its token ids, or the error of a group that cannot be
    encoded. Raises UnusableTemplate if the tokenizer has no usable chat template.

    `today` is the date that some chat templates write; None means the day on which this process first needed the date.
    The template and the tokenizer are called for many groups together, and the tokenizer reads each prompt once.
    """
    groups = iter(groups)
    while members := list(islice(groups, AT_A_TIME)):
        yield from _encode_together(members, tokenizer, today)


def _encode_together(
    groups: Sequence[Group], tokenizer: "PreTrainedTokenizerBase", today: date | None
) -> Iterator[EncodedGroup | InvalidRow]:
    written = write_groups(groups, tokenizer, today)
    texts = [text for text in written if isinstance(text, WrittenGroup)]
    prompts = _ids([text.prompt for text in texts], tokenizer)
    tails = [_tail(text.prompt, ids, tokenizer) for text, ids in zip(texts, prompts, strict=True)]
    continued = [
        tail.text + completion for text, tail in zip(texts, tails, strict=True) for completion in text.completions
    ]
    continued_ids = iter(_ids(continued, tokenizer))
    ready = zip(texts, prompts, tails, strict=True)
    for group, text in zip(groups, written, strict=True):
        if isinstance(text, InvalidRow):
            yield text
            continue
        _, prompt_ids, tail = next(ready)
        completion_ids = tuple(
            _behind(tail.ids, next(continued_ids), completion, tokenizer) for completion in text.completions
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
        return invalid_group(group, "empty_prompt", "the prompt has no tokens; write some text into the prompt.")
    if not all(completion_ids):
        return invalid_group(
            group, "empty_completion", "a completion has no tokens; write some text into the completion."
        )
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


@dataclass(frozen=True)
class _Tail:
    """The end of a prompt, as text and as token ids. The tokenizer gives a completion the same ids after this end as
    after the whole prompt. Therefore the tokenizer need not read the whole prompt again for each completion."""

    text: str
    ids: Sequence[int]


def _tail(prompt: str, ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> _Tail:
    """Returns the end of a prompt, which begins at the prompt's last special token, because tokenizers first cut a text
    at special tokens. Returns the whole prompt if it has no special token. `ids` are the token ids of the prompt."""
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
    tail_ids: Sequence[int], continued_ids: Sequence[int], completion: str, tokenizer: "PreTrainedTokenizerBase"
) -> Sequence[int]:
    """Returns the token ids of a completion that follows a prompt. `continued_ids` are the ids of the prompt's end and
    the completion together; `tail_ids` are the ids of the prompt's end alone.

    If one token contains both the last characters of the prompt and the first of the completion, the completion is
    encoded by itself. The reason is that a served policy always has the prompt's own ids before its answer.
    """
    if continued_ids[: len(tail_ids)] == tail_ids:
        return continued_ids[len(tail_ids) :]
    return _ids([completion], tokenizer)[0]


def _tokens_of(
    span: tuple[int, int], text: str, ids: Sequence[int], tail: _Tail, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, int]:
    """Turns a range of characters in a completion into the range of the completion's tokens that stand for these
    characters. Both ranges are pairs: the start, and the end that is not included.

    `span` is the range of characters, `text` the completion's text, and `ids` the completion's tokens. `tail` is the
    end of the prompt, which is needed because the first tokens of a completion may depend on the text before them. If
    `span` starts in the middle of a token, the range includes this token. If `span` ends in the middle of a token, the
    range does not include this token.
    """
    befores = _ids([tail.text + text[:place] for place in span], tokenizer)
    starts = (_behind(tail.ids, before, text[:place], tokenizer) for before, place in zip(befores, span, strict=True))
    start, stop = (len(commonprefix([list(part), list(ids)])) for part in starts)  # noqa: RUF071 (ids are meant)
    return start, stop


def _ids(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    if not texts:
        return []
    if not _calls_library(tokenizer):
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return cast(list[list[int]], tokenizer(texts, **options).input_ids)
    library = cast("Tokenizer", tokenizer.backend_tokenizer)
    library.no_truncation()  # a call of the tokenizer sets the same three options
    library.no_padding()
    library.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]


@lru_cache(maxsize=8)
def _calls_library(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether this tokenizer only calls the library `tokenizers`, and does nothing else with a text. For such a
    tokenizer the library can be called directly, which is faster because the library then need not report offsets."""
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(tokenizer)
    is_plain = kind.__call__ is Fast.__call__ and kind._encode_plus is Fast._encode_plus  # some models override these
    return issubclass(kind, Fast) and is_plain
