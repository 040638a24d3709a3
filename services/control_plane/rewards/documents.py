"""The JSON objects of rewards, as the OpenAPI document describes them. docs/use/rewards.md explains the fields."""

from typing import Literal

from typing_extensions import TypedDict


class JudgedDocument(TypedDict):
    index: int
    reward: float
    num_tokens: int
    outputs: list[float] | None
    log_ratio: float | None
    logp: float | None
    reference_logp: float | None
    probability: float


class RewardsDocument(TypedDict):
    object: Literal["rewards"]
    index: int
    winner: int
    completions: list[JudgedDocument]


class ReadTokens(TypedDict):
    prompt_tokens: int
    total_tokens: int


class RewardsList(TypedDict):
    object: Literal["list"]
    model: str
    reference: str | None
    beta: float | None
    data: list[RewardsDocument]
    usage: ReadTokens
