"""Defines the task on which policies are compared: a tiny language of reviews, its reward, and exact measures.

A text has six of twelve words. The first two are the prompt, the other four the answer. A prompt has 20,736 answers, so
expected rewards and KL divergences are sums over all answers, and nothing about a policy is estimated.
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
    """Returns the reward of each text, [...] for `texts` [..., 6]: the sum of the values of the answer's words.

    "great" has the value 1, "good" 0.5, "bad" -0.5 and "awful" -1. "very" before a word doubles its value, and "not"
    turns it round.
    """
    return (VALUES[texts[..., PROMPT:]] * FACTORS[texts[..., PROMPT - 1 : -1]]).sum(-1)


def every_prompt(seed: int) -> tuple[Tensor, Tensor]:
    """Returns the prompts for training [138, 2] and the held-out prompts [6, 2]."""
    prompts = _sequences(PROMPT)[torch.randperm(len(WORDS) ** PROMPT, generator=generator(seed))]
    return prompts[NUM_HELD_OUT:], prompts[:NUM_HELD_OUT]


def human_texts(prompts: Tensor, num: int, seed: int) -> Tensor:
    """Returns `num` texts [num, 6] that stand for those of people. Each word depends at random on the two before it."""
    rng, size = generator(seed), len(WORDS)
    chain = torch.randn(size, size, size, generator=rng).mul(1.5).softmax(-1)
    texts = prompts[torch.randint(len(prompts), (num,), generator=rng)]
    for _ in range(ANSWER):
        following = chain[texts[:, -2], texts[:, -1]].multinomial(1, generator=rng)
        texts = torch.cat([texts, following], 1)
    return texts


@torch.no_grad()
def sample(policy: PreTrainedModel, prompts: Tensor, rng: torch.Generator) -> Tensor:
    """Returns each prompt [B, 2] with an answer that the policy writes, [B, 6]."""
    texts = prompts
    for _ in range(ANSWER):
        following = policy(input_ids=texts).logits[:, -1].softmax(-1).multinomial(1, generator=rng)
        texts = torch.cat([texts, following], 1)
    return texts


def every_text(prompts: Tensor) -> Tensor:
    """Returns each of P prompts with every answer, [P, 20736, 6]."""
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
    """Returns the exact KL divergence and expected reward of a policy. All arguments are [P, N], for each of P prompts
    and its N answers."""
    probabilities = logps.exp()
    kl, reward = probabilities * (logps - ref_logps), probabilities * rewards
    return Point(kl.sum(1).mean().item(), reward.sum(1).mean().item())


def optimum(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Returns the log-probabilities of the best policy: pi_ref exp(r / beta) / Z, arXiv 2305.18290, equation 4."""
    return (ref_logps + rewards / beta).log_softmax(-1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sequences(length: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(len(WORDS))] * length)
