"""Measures by how much a trained adapter changes the log-probabilities of some of its training rows, and judges whether
another program that computes with the adapter changes them as much.

A program may ignore an adapter, or a part of it, without an error. Its answers are then those of the base, the model
under the adapter.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.adapter_folder import EFFECT
from dpo_core.models.model import adapter_off
from dpo_core.policy.admission import check_ids
from dpo_core.policy.scorer import Scorer

NUM_ROWS, SIDE_TOKENS = 4, 64  # rows that are measured, and most tokens of a row's prompt and of its completion
LEAST = 1e-3  # nats; a smaller effect is not judged
NOISE_FACTOR = 16.0  # how many times larger than the noise an effect must be to be judged
ALLOWED_SHARE = 0.5  # of the effect, which may be missing or too much


@dataclass(frozen=True)
class Row:
    """A training row, as the token ids of its prompt and of one completion, with two log-probabilities of the
    completion: with the adapter (`policy`), and without it (`base`). A long row is shortened.

    Both log-probabilities are in nats, summed over the completion's tokens.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    policy: float
    base: float

    @property
    def change(self) -> float:
        """By how much the adapter changes the completion's log-probability, in nats."""
        return self.policy - self.base


@dataclass(frozen=True)
class Effect:
    """The effect of a trained adapter, as the trainer's own forward pass measured it on some training rows (`rows`).
    Each row has the log-probability of its completion with the adapter and without it."""

    rows: list[Row]

    @property
    def largest(self) -> float:
        """The largest change, in nats, that the adapter makes to the log-probability of a row's completion. The sign of
        the change does not count."""
        return max(abs(row.change) for row in self.rows)

    def fault(self, policy: Sequence[float], base: Sequence[float]) -> str | None:
        """Checks whether another program, such as vLLM, computes with the adapter as the trainer does: whether the
        adapter changes the log-probabilities of the rows there as much as it did in training. Returns the difference as
        a part of a sentence. Returns None if the difference is small, or if the effect is too small compared with the
        noise to judge.

        `policy` and `base` are the log-probabilities of the rows in the other program, with and without the adapter.
        The noise is the largest difference between the two programs without the adapter. A log-probability with the
        adapter that is not a finite number is always a fault.
        """
        if not all(map(isfinite, policy)):
            return "it gives one of its training rows a log-probability that is not a finite number"
        noise = max(abs(row.base - found) for row, found in zip(self.rows, base, strict=True))
        if not self.largest > max(LEAST, NOISE_FACTOR * noise):
            return None
        changes = [with_adapter - without for with_adapter, without in zip(policy, base, strict=True)]
        error, row, change = max(
            ((abs(change - row.change), row, change) for row, change in zip(self.rows, changes, strict=True)),
            key=lambda found: found[0],
        )
        if error <= (allowed := ALLOWED_SHARE * self.largest):
            return None
        return (
            f"it changes the log-probability of one of its training rows by {change:.3g} nats here, but by "
            f"{row.change:.3g} in training; at most {allowed:.3g} may be between them"
        )

    def to_json(self) -> bytes:
        """Returns the rows with their log-probabilities as JSON, for the file effect.json that is saved beside the
        adapter."""
        return json.dumps(asdict(self)).encode()


def read_effect(folder: Path) -> Effect | None:
    """Returns the effect of the adapter saved in `folder`: the log-probabilities of some training rows with and without
    the adapter, as training measured them. Returns None if the folder has no such measurement.

    Ignores fields of the file that only a later release knows. Raises ValueError if the file is damaged.
    """
    file = folder / EFFECT
    if not file.is_file():
        return None
    names = [field.name for field in fields(Row)]
    try:
        return Effect([Row(*(row[name] for name in names)) for row in json.loads(file.read_bytes())["rows"]])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file.name} is damaged ({error!r})") from None


def measured_groups(groups: Sequence[EncodedGroup]) -> list[int]:
    """Returns the indices of those groups in `groups` (prompts with their completions) that `measure_effect` measures.
    `measure_effect` needs the token ids of these groups only."""
    return [i for i, _ in _shortest(groups)]


def _shortest(groups: Sequence[EncodedGroup]) -> list[tuple[int, int]]:
    """Returns the NUM_ROWS shortest rows in `groups` (prompts with their completions). A row is a prompt with one of
    its completions, written as a pair: the index of the group, and the index of the completion in the group."""

    def length(row: tuple[int, int]) -> int:
        group = groups[row[0]]
        return sum(min(len(ids), SIDE_TOKENS) for ids in (group.prompt_ids, group.completion_ids[row[1]]))

    rows = [(i, j) for i, group in enumerate(groups) for j in range(len(group.completion_ids))]
    return sorted(rows, key=length)[:NUM_ROWS]


@torch.no_grad()
def measure_effect(scorer: Scorer, groups: Sequence[EncodedGroup], *, max_tokens_per_pack: int) -> Effect:
    """Measures by how much the adapter of the scorer's policy changes the log-probabilities of the shortest completions
    in `groups` (prompts with their completions). A long row (a prompt with one completion) is shortened. A forward pass
    has at most `max_tokens_per_pack` tokens, unless a single row is longer.

    If the policy is sharded, all ranks (processes of the run) must call this function together, with the same groups.
    """
    shortest = _shortest(groups)
    check_ids([groups[i] for i, _ in shortest])
    rows = [
        EncodedGroup(
            groups[i].prompt_ids[-SIDE_TOKENS:], (groups[i].completion_ids[j][:SIDE_TOKENS],), None, groups[i].line
        )
        for i, j in shortest
    ]
    policy = _logps(scorer, rows, max_tokens_per_pack)
    with adapter_off(scorer.model):
        base = _logps(scorer, rows, max_tokens_per_pack)
    return Effect(
        [
            Row(list(row.prompt_ids), list(row.completion_ids[0]), with_adapter, without)
            for row, with_adapter, without in zip(rows, policy, base, strict=True)
        ]
    )


def _logps(scorer: Scorer, rows: Sequence[EncodedGroup], max_tokens_per_pack: int) -> list[float]:
    logps = [0.0] * len(rows)
    for pack in scorer.plan(rows, num_ranks=1, max_tokens_per_pack=max_tokens_per_pack)[0]:
        found = scorer(scorer.collate([rows[i] for i in pack]))[:, 0].tolist()
        for i, logp in zip(pack, found, strict=True):
            logps[i] = logp
    if isinstance(scorer, FSDPModule):
        scorer.reshard()  # in training the backward pass does this
    return logps
