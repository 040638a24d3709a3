"""Makes rows of training data from a policy's scored answers: pairs or rankings, without ties and repetitions.

The functions depend only on their arguments.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations
from typing import IO, Any, Literal

from dpo_core.data.groups import Group
from dpo_core.data.messages import Text
from services.control_plane.evaluations.kinds.asking import completion_of

Type = Literal["best_worst", "all_pairs", "ranking", "rso"]
Row = dict[str, Any]
Sample = tuple[Group, Mapping[str, Any]]
"""A prompt with what the evaluation `samples` found: `answers` and their `scores`."""

WORDS = re.compile(r"\w+")


@dataclass(frozen=True)
class Answer:
    """An answer of the policy to a prompt, and the answer's score; a higher score is better."""

    text: str
    score: float

    @property
    def words(self) -> tuple[str, ...]:
        """Returns the answer's words in lower case, without white space and punctuation. Answers with the same words
        count as duplicates.
        """
        return tuple(WORDS.findall(self.text.casefold())) or (self.text.strip(),)


@dataclass(frozen=True)
class Accepted:
    """The answers that rejection sampling accepted, in the order in which it accepted them, and the number of times
    that it tried a candidate.
    """

    answers: list[Answer]
    num_tried: int


def reject(candidates: Sequence[Answer], beta: float, count: int, draw: random.Random) -> Accepted:
    """Returns `count` of the candidates, chosen by statistical rejection sampling, or all candidates if there are
    fewer.

    The method is algorithm 1 of RSO (arXiv 2309.06657). It goes through the candidates, again and again, until it has
    accepted enough. It accepts a candidate with the probability exp((score - highest score of the candidates left) /
    beta), and each candidate only once. If many candidates are drawn from a policy pi, the accepted ones are
    distributed as pi(y) exp(score(y) / beta), up to a constant.
    """
    left, accepted, num_tried = list(candidates), list[Answer](), 0
    while left and len(accepted) < count:
        highest, kept = max(answer.score for answer in left), list[Answer]()
        for answer in left:
            if len(accepted) == count:
                break
            num_tried += 1
            is_accepted = draw.random() < math.exp((answer.score - highest) / beta)
            (accepted if is_accepted else kept).append(answer)
        left = kept
    return Accepted(accepted, num_tried)


@dataclass(frozen=True)
class Selection:
    """The rule by which the answers to a prompt become rows of training data. `beta` and `num_accepted` are options of
    the type `rso`, which is rejection sampling.
    """

    type: Type
    beta: float = 0.5
    num_accepted: int = 2

    def most_rows(self, num_samples: int) -> int:
        """Returns how many rows `num_samples` answers to a prompt make at most."""
        of_types = {"all_pairs": num_samples * (num_samples - 1) // 2, "rso": self.num_accepted // 2}
        return of_types.get(self.type, 1)

    def rows(self, group: Group, answers: Sequence[Answer], draw: random.Random, counts: Counter[str]) -> list[Row]:
        """Makes rows of training data from the answers to the prompt of `group` (a prompt with completions), and
        returns the rows.

        `draw` gives the random numbers for rejection sampling (the selection type `rso`). Adds to `counts`:

        - `num_duplicates`: the number of answers (with `rso`, of pairs of answers) that were left out because their
          words are the same
        - `num_ties`: with `rso`, the number of pairs of answers with equal scores; with other types, 1 if all answers
          to the prompt have the same score
        - `num_tried`, only with `rso`: how often rejection sampling looked at an answer
        - `num_accepted`, only with `rso`: how many answers rejection sampling accepted
        """
        if self.type == "rso":
            accepted = reject(answers, self.beta, self.num_accepted, draw)
            counts.update(num_tried=accepted.num_tried, num_accepted=len(accepted.answers))
            pairs = zip(accepted.answers[::2], accepted.answers[1::2], strict=False)
            return [_pair(group, *sides) for sides in map(_sorted, _different(pairs, counts)) if sides]
        distinct = list({answer.words: answer for answer in reversed(answers)}.values())[::-1]
        counts["num_duplicates"] += len(answers) - len(distinct)
        ordered = sorted(distinct, key=lambda answer: -answer.score)
        if len({answer.score for answer in ordered}) < 2:
            counts["num_ties"] += 1
            return []
        if self.type == "best_worst":
            return [_pair(group, ordered[0], ordered[-1])]
        if self.type == "ranking":
            return [_ranking(group, ordered)]
        two = combinations(ordered, 2)
        return [_pair(group, one, other) for one, other in two if one.score > other.score]


def _different(pairs: Iterable[tuple[Answer, Answer]], counts: Counter[str]) -> Iterable[tuple[Answer, Answer]]:
    """Yields the pairs whose two answers differ both in their words and in their scores. Counts the other pairs in
    `counts`, as duplicates or as ties.
    """
    for one, other in pairs:
        if one.words == other.words:
            counts["num_duplicates"] += 1
        elif one.score == other.score:
            counts["num_ties"] += 1
        else:
            yield one, other


def _sorted(pair: tuple[Answer, Answer]) -> tuple[Answer, Answer]:
    one, other = pair
    return (one, other) if one.score > other.score else (other, one)


def _pair(group: Group, better: Answer, worse: Answer) -> Row:
    return {
        **_prompt(group),
        "chosen": completion_of(group.prompt, better.text),
        "rejected": completion_of(group.prompt, worse.text),
        "score_chosen": better.score,
        "score_rejected": worse.score,
    }


def _ranking(group: Group, answers: Sequence[Answer]) -> Row:
    completions: list[Text] = [completion_of(group.prompt, answer.text) for answer in answers]
    return {**_prompt(group), "completions": completions, "scores": [answer.score for answer in answers]}


def _prompt(group: Group) -> Row:
    more = {"tools": group.tools, "chat_template_kwargs": group.template_arguments}
    return {"prompt": group.prompt, **{name: value for name, value in more.items() if value}}


def rows_of(selection: Selection, samples: Sequence[Sample], seed: str) -> tuple[list[Row], dict[str, int]]:
    """Makes rows of training data from samples (prompts with scored answers of the policy), by the rule `selection`.

    Returns two values: the rows, each only once, and a dictionary with the numbers of prompts, answers and rows, and
    of the answers and rows that were left out for each reason.

    An answer that was cut off at the limit of tokens is left out: training would teach the policy to stop there. The
    same `seed` gives the same rows.
    """
    counts, rows = Counter[str](), dict[bytes, Row]()
    num_rows = 0
    for number, (group, found) in enumerate(samples):
        pairs = zip(found["answers"], found["scores"], strict=True)
        answers = [Answer(answer["text"], score) for answer, score in pairs if answer["is_finished"]]
        counts.update(num_answers=len(found["answers"]), num_unfinished=len(found["answers"]) - len(answers))
        made = selection.rows(group, answers, random.Random(f"{seed} {number}"), counts)
        num_rows += len(made)
        rows |= {sha256(json.dumps(row, sort_keys=True).encode()).digest(): row for row in made}
    names = ["num_answers", "num_unfinished", "num_duplicates", "num_ties"]
    names += ["num_tried", "num_accepted"] if selection.type == "rso" else []
    told = {"num_prompts": len(samples), **{name: counts[name] for name in names}}
    return list(rows.values()), told | {"num_repeated_rows": num_rows - len(rows), "num_rows": len(rows)}


def write_rows(file: IO[bytes], selection: Selection, samples: Sequence[Sample], seed: str) -> dict[str, int]:
    """Makes rows of training data with `rows_of` from `selection`, `samples` and `seed`. Writes the rows into the file
    as JSON Lines, and seeks to the start of the file. Returns the counts that `rows_of` returns.
    """
    rows, counts = rows_of(selection, samples, seed)
    file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    file.seek(0)
    return counts
