"""Evaluates whether a policy with its reference model, or a reward model, prefers the completions that people
preferred.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.data.groups import Group
from services.control_plane.evaluations import statistics
from services.control_plane.evaluations.kinds import rewarding
from services.control_plane.evaluations.kinds.asking import Models
from services.control_plane.evaluations.kinds.kind import Found
from services.control_plane.evaluations.requests import Spec
from services.control_plane.rewards.judges import Judge, judge_of
from services.control_plane.settings import Settings

MUCH_LONGER = 1.1  # completions are about as long as each other up to this ratio of their tokens


@dataclass(frozen=True)
class Preferences:
    """The models whose rewards are compared with people's ratings: a policy with its reference model, or a reward
    model.
    """

    judge: Judge

    @property
    def num_stages(self) -> int:
        return rewarding.num_stages(self.judge)

    @property
    def resolved(self) -> dict[str, Any]:
        return {"reference": self.judge.reference and self.judge.reference.id, "beta": self.judge.beta}

    async def work(self, stage: int, number: int, group: Group, found: Found, models: Models) -> Found:
        kept, rewards = await rewarding.reward(self.judge, stage, group, found, models)
        if rewards is None:
            return kept
        lengths = [each.num_tokens for each in rewards]
        return kept | ranked([each.reward for each in rewards], lengths, group.ratings)

    def summarize(self, items: Sequence[Found]) -> dict[str, Any]:
        by_length: dict[str, list[Found]] = {name: [] for name in ("shorter", "similar", "longer")}
        for item in items:
            by_length[item["better_is"]].append(item)
        parts = {name: {"num_items": len(part), **_figures(part)} for name, part in by_length.items()}
        return {**_figures(items), "better_is": parts}


def ranked(rewards: Sequence[float], lengths: Sequence[int], ratings: Sequence[float] | None) -> Found:
    """Compares the rewards of a prompt's completions with people's ratings of these completions.

    `lengths` are the completions' numbers of tokens. The completions are in order, the best one first. If `ratings` is
    None, the first completion counts as better than all other completions, which count as equally good. Returns a
    dictionary:

    - `rewards` and `num_tokens` repeat the rewards and the lengths as lists.
    - `is_right` says whether each of the best completions has a higher reward than each completion that is not among
      the best.
    - `margin` is the mean reward of the best completions minus the mean reward of all other completions.
    - `better_is` says whether the best completions are `longer` than the other completions, `shorter`, or of `similar`
      length.
    """
    ratings = ratings or [1.0] + [0.0] * (len(rewards) - 1)
    best = [rating == max(ratings) for rating in ratings]
    better, worse = (
        [reward for reward, is_best in zip(rewards, best, strict=True) if is_best is side] for side in (True, False)
    )
    long, short = (
        fmean(length for length, is_best in zip(lengths, best, strict=True) if is_best is side)
        for side in (True, False)
    )
    return {
        "rewards": list(rewards),
        "num_tokens": list(lengths),
        "is_right": min(better) > max(worse),
        "margin": fmean(better) - fmean(worse),
        "better_is": "longer" if long > MUCH_LONGER * short else "shorter" if short > MUCH_LONGER * long else "similar",
    }


def _figures(items: Sequence[Found]) -> dict[str, Any]:
    if not items:
        return {"accuracy": None, "margin": None}
    return {
        "accuracy": asdict(statistics.wilson(sum(item["is_right"] for item in items), len(items))),
        "margin": asdict(statistics.mean([item["margin"] for item in items])),
    }


async def of(session: AsyncSession, settings: Settings, spec: Spec) -> Preferences:
    """Returns the evaluation that `spec` describes, with its models: the policy and its reference model, or the reward
    model.

    Raises NotFound for a model that does not exist, and InvalidRequest if the reference model or beta is not known.
    """
    return Preferences(await judge_of(session, settings, spec.model, reference=spec.reference, beta=spec.beta))
