"""Defines the task on which the frontier benchmark compares policies: a tiny language of film reviews, and its reward.

A text has six words from a vocabulary of twelve. The first two words are the prompt, the other four the answer. A
prompt has only 20,736 possible answers, so the expected reward and the KL divergence of a policy are computed exactly,
as sums over all answers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

WORDS = ["great", "good", "bad", "awful", "not", "very", "the", "film", "plot", "is", "and", "."]
PROMPT, ANSWER = 2, 4  # words
NUM_HELD_OUT = 6  # prompts on which policies are measured; the other 138 are for training
VALUES = torch.tensor([1.0, 0.5, -0.5, -1.0] + [0.0] * 8)
FACTORS = torch.tensor([1.0] * 4 + [-1.0, 2.0] + [1.0] * 6)  # "not" turns the value of the next word round


@dataclass(frozen=True)
class Point:
    """The exact KL divergence of a policy from the reference, in nats per answer, and the policy's expected reward.
    Both are means over the held-out prompts."""

    kl: float
    reward: float


def true_reward(texts: Tensor) -> Tensor:
    """Returns the reward of each text, [...] for `texts` [..., 6]: the sum of the values of the answer's four words.

    "great" has the value 1, "good" 0.5, "bad" -0.5 and "awful" -1; all other words have the value 0. The word "very"
    before a word doubles the word's value, and "not" before a word changes the sign of its value.
    """
    return (VALUES[texts[..., PROMPT:]] * FACTORS[texts[..., PROMPT - 1 : -1]]).sum(-1)


def every_prompt(seed: int) -> tuple[Tensor, Tensor]:
    """Returns all prompts of two words, in a random order, as two tensors: 138 prompts to train on [138, 2], and 6
    prompts to measure on [6, 2]."""
    prompts = _sequences(PROMPT)[torch.randperm(len(WORDS) ** PROMPT, generator=generator(seed))]
    return prompts[NUM_HELD_OUT:], prompts[:NUM_HELD_OUT]


def human_texts(prompts: Tensor, num: int, seed: int) -> Tensor:
    """Returns `num` random texts [num, 6] that stand for texts written by people. A text begins with one of `prompts`.
    Each other word is drawn from a random distribution that depends on the two words before it."""
    rng, size = generator(seed), len(WORDS)
    chain = torch.randn(size, size, size, generator=rng).mul(1.5).softmax(-1)
    texts = prompts[torch.randint(len(prompts), (num,), generator=rng)]
    for _ in range(ANSWER):
        following = chain[texts[:, -2], texts[:, -1]].multinomial(1, generator=rng)
        texts = torch.cat([texts, following], 1)
    return texts


@torch.no_grad()
def sample(policy: PreTrainedModel, prompts: Tensor, rng: torch.Generator) -> Tensor:
    """Samples from the policy an answer of four words to each of B prompts [B, 2], and returns the prompts with their
    answers, [B, 6]."""
    texts = prompts
    for _ in range(ANSWER):
        following = policy(input_ids=texts).logits[:, -1].softmax(-1).multinomial(1, generator=rng)
        texts = torch.cat([texts, following], 1)
    return texts


def every_text(prompts: Tensor) -> Tensor:
    """Returns every text that begins with one of P prompts: each prompt with every possible answer, [P, 20736, 6]."""
    answers = _sequences(ANSWER)
    size = (len(prompts), len(answers), -1)
    return torch.cat([prompts[:, None].expand(*size), answers.expand(*size)], 2)


@torch.no_grad()
def every_logp(policy: PreTrainedModel, prompts: Tensor) -> Tensor:
    """Returns the log-probability of every answer to each of P prompts, [P, 20736] float64, in the order of
    `every_text`."""
    beginnings, last, rows = _sequences(ANSWER - 1), slice(PROMPT - 1, None), []
    for prompt in prompts:
        texts = torch.cat([prompt.expand(len(beginnings), -1), beginnings], 1)
        logps = policy(input_ids=texts).logits[:, last].double().log_softmax(-1)
        written = logps[:, :-1].gather(2, beginnings[..., None]).sum((1, 2))
        rows.append((written[:, None] + logps[:, -1]).flatten())
    return torch.stack(rows)


def measure(logps: Tensor, ref_logps: Tensor, rewards: Tensor) -> Point:
    """Returns the exact KL divergence of a policy from the reference, and the policy's expected reward.

    `logps` and `ref_logps` are the log-probabilities of the N possible answers to each of P prompts under the policy
    and the reference, and `rewards` are these answers' rewards. All three are [P, N].
    """
    probabilities = logps.exp()
    kl, reward = probabilities * (logps - ref_logps), probabilities * rewards
    return Point(kl.sum(1).mean().item(), reward.sum(1).mean().item())


def optimum(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Returns the log-probabilities of the policy that maximizes the reward minus beta times the KL divergence from the
    reference: pi_ref exp(r / beta) / Z, arXiv 2305.18290, equation 4.

    `ref_logps` and `rewards` are the log-probabilities under the reference, and the rewards, of all answers to each
    prompt.
    """
    return (ref_logps + rewards / beta).log_softmax(-1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sequences(length: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(len(WORDS))] * length)
