"""Text becomes token ids, prompt and completions apart, once and for all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dpo_core.formats import Group
from dpo_core.jsonl import InvalidRow
from dpo_core.messages import Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NoChatTemplate(ValueError):
    """The rows hold messages, and the model does not say how to write them."""


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
    if isinstance(group.prompt, str):
        prompt = _with_bos(group.prompt, tokenizer)
    else:
        prompt = _render(group, group.prompt, tokenizer)
    prompt_ids = _ids(prompt, tokenizer)
    if not prompt_ids:
        raise _invalid(group, "empty_prompt", "the prompt has no tokens; give it some text.")
    texts = [_completion_text(group, prompt, completion, tokenizer) for completion in group.completions]
    completion_ids = tuple(_completion_ids(prompt, prompt_ids, text, tokenizer) for text in texts)
    if not all(completion_ids):
        raise _invalid(group, "empty_completion", "a completion has no tokens; give it some text.")
    return EncodedGroup(
        prompt_ids,
        completion_ids,
        None,
        group.line,
        ratings=group.ratings,
        weight=group.weight,
        margin=group.margin,
    )


def _completion_text(group: Group, prompt: str, completion: Text, tokenizer: "PreTrainedTokenizerBase") -> str:
    if isinstance(completion, str):
        eos = tokenizer.eos_token or ""
        return completion if completion.endswith(eos) else completion + eos
    assert isinstance(group.prompt, list)
    whole = _render(group, group.prompt + completion, tokenizer)
    if not whole.startswith(prompt):
        raise _invalid(
            group,
            "template_not_prefix",
            "the chat template renders the prompt differently once the completion follows; fix the template.",
        )
    return whole[len(prompt) :]


def _completion_ids(
    prompt: str, prompt_ids: list[int], text: str, tokenizer: "PreTrainedTokenizerBase"
) -> Sequence[int]:
    """The ids that follow the prompt's. Where a token would span the border, the text is encoded by itself,
    as a served policy has only ever the prompt's own ids before it."""
    whole = _ids(prompt + text, tokenizer)
    if whole[: len(prompt_ids)] == prompt_ids:
        return whole[len(prompt_ids) :]
    return _ids(text, tokenizer)


def _render(group: Group, messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> str:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise NoChatTemplate("The tokenizer has no chat template; send texts instead of messages, or add a template.")
    try:
        return cast(
            str,
            tokenizer.apply_chat_template(
                messages, tools=group.tools, tokenize=False, add_generation_prompt=messages is group.prompt
            ),
        )
    except TemplateError as error:
        raise _invalid(group, "template_refused", f"the chat template refuses the messages: {error}.") from None


def _with_bos(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The prompt behind the BOS token, where the tokenizer wants one and the text does not bring it."""
    bos = tokenizer.bos_token
    wanted = bos is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return prompt if not wanted or prompt.startswith(bos) else bos + prompt


def _ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    return cast(list[int], tokenizer(text, add_special_tokens=False).input_ids)


def _invalid(group: Group, code: str, what: str) -> InvalidRow:
    return InvalidRow(group.line, "", code, f"Line {group.line}: {what}")
