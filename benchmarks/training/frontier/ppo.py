"""Trains a policy with reinforcement learning: Proximal Policy Optimization (PPO), arXiv 1707.06347.

The module implements the usual form of PPO for language models, arXiv 2203.02155. Each token is penalized by beta times
the log-ratio of policy and reference, and the last token also gets the reward of the whole text. The expected sum of
both is the objective in equation 3 of the DPO paper, arXiv 2305.18290.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import LlamaForTokenClassification, PreTrainedModel

from benchmarks.training.frontier.task import ANSWER, PROMPT, generator, sample
from dpo_core import load_policy

NUM_TEXTS, NUM_PASSES, NUM_PARTS = 256, 2, 2  # per update: texts, passes over them, optimizer steps of a pass
CLIP, GAE_LAMBDA, MAX_GRAD_NORM = 0.2, 0.95, 1.0
Reward = Callable[[Tensor], Tensor]  # texts [B, 6] to rewards [B]


@dataclass(frozen=True)
class Rollout:
    """B texts that the policy wrote, and the tensors from which PPO's update learns: `logps`, `advantages` and
    `returns`. Each of the three is [B, 4], a value for each of the four words of an answer."""

    texts: Tensor  # [B, 6]
    logps: Tensor  # of the policy that wrote them
    advantages: Tensor
    returns: Tensor  # what the value model learns to predict

    def parts(self, rng: torch.Generator) -> Iterator["Rollout"]:
        """Yields the texts of the rollout in NUM_PARTS parts of equal sizes, in a random order."""
        for places in torch.randperm(len(self.texts), generator=rng).chunk(NUM_PARTS):
            yield Rollout(self.texts[places], self.logps[places], self.advantages[places], self.returns[places])


def updates(
    folder: Path,
    policy: PreTrainedModel,
    reward: Reward,
    prompts: Tensor,
    *,
    beta: float,
    rate: float,
    num: int,
    seed: int,
) -> Iterator[float]:
    """Trains `policy` in place with `num` updates of PPO on answers to `prompts`. Yields after each update the share of
    the updates that are done, from 1 / `num` to 1.

    `folder` holds the model that is both the reference and the start of the value model. `reward` is a function that
    returns the reward of each text. `beta` is the weight of the KL penalty, and `rate` the first learning rate, which
    falls to 0.
    """
    torch.manual_seed(seed)  # draws the head of the value model
    rng, reference = generator(seed), load_policy(folder)
    critic = LlamaForTokenClassification.from_pretrained(folder, num_labels=1).eval()
    weights = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num)
    for update in range(1, num + 1):
        asked = prompts[torch.randint(len(prompts), (NUM_TEXTS,), generator=rng)]
        rollout = _roll_out(policy, reference, critic, reward, sample(policy, asked, rng), beta)
        for part in (part for _ in range(NUM_PASSES) for part in rollout.parts(rng)):
            optimizer.zero_grad()
            loss = _policy_loss(policy, part) + mse_loss(_values(critic, part.texts), part.returns)
            loss.backward()
            for model in (policy, critic):
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
        schedule.step()
        yield update / num


@torch.no_grad()
def _roll_out(
    policy: PreTrainedModel, reference: PreTrainedModel, critic: nn.Module, reward: Reward, texts: Tensor, beta: float
) -> Rollout:
    """Returns the rollout of `texts`, which the policy wrote: the texts with their log-probabilities, advantages and
    returns. The advantages are generalized advantage estimates, arXiv 1506.02438, without discount.

    `critic` is the value model. A text earns its `reward`, minus `beta` times the log-ratio of policy and reference.
    """
    logps, values = _logps(policy, texts), _values(critic, texts)
    rewards = -beta * (logps - _logps(reference, texts))
    rewards[:, -1] += reward(texts)
    advantages, following = torch.zeros_like(rewards), torch.zeros(len(texts))
    after = torch.cat([values[:, 1:], torch.zeros(len(texts), 1)], 1)  # nothing comes after the last word
    for word in reversed(range(ANSWER)):
        following = rewards[:, word] + after[:, word] - values[:, word] + GAE_LAMBDA * following
        advantages[:, word] = following
    normal = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
    return Rollout(texts, logps, normal, advantages + values)


def _policy_loss(policy: PreTrainedModel, part: Rollout) -> Tensor:
    """Returns PPO's clipped loss of the policy on a part of the texts, arXiv 1707.06347, equation 7."""
    ratios = (_logps(policy, part.texts) - part.logps).exp()
    return -torch.min(ratios * part.advantages, ratios.clamp(1 - CLIP, 1 + CLIP) * part.advantages).mean()


def _logps(policy: PreTrainedModel, texts: Tensor) -> Tensor:
    """Returns the policy's log-probability of each of the four words of B answers, [B, 4]."""
    logps = policy(input_ids=texts[:, :-1]).logits[:, PROMPT - 1 :].log_softmax(-1)
    return logps.gather(2, texts[:, PROMPT:, None])[..., 0]


def _values(critic: nn.Module, texts: Tensor) -> Tensor:
    """Returns the estimates of the value model (critic), [B, 4]: the return that it expects before each of the four
    words of B answers."""
    values: Tensor = critic(input_ids=texts[:, :-1]).logits[:, PROMPT - 1 :, 0]
    return values
