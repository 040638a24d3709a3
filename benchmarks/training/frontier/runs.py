"""Trains the policies of one seed: makes the reference and preferences, and trains a policy for each method and
beta."""

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.training.frontier import ppo
from benchmarks.training.frontier.stages import groups_of, preferences, save_random_model, steps
from benchmarks.training.frontier.task import (
    Point,
    every_logp,
    every_prompt,
    every_text,
    human_texts,
    measure,
    optimum,
    true_reward,
)
from dpo_core import load_policy, load_reward_model
from dpo_core.options import Dpo, Ipo, Kto, RewardBradleyTerry, Simpo, Supervised

OBJECTIVES = [Dpo(beta=0.2), Dpo(beta=0.5), Dpo(beta=1.0), Ipo(beta=0.2), Ipo(beta=1.0)]
OBJECTIVES += [Kto(beta=0.2), Kto(beta=1.0), Simpo(beta=1.0), Simpo(beta=5.0)]
PPO_BETAS = (0.2, 0.5, 1.0)
OPTIMUM_BETAS = (0.25, 0.3, 0.4, 0.5, 0.7, 1.0, 2.0)
PPO_TRUE, PPO_LEARNED = "PPO, true reward", "PPO, learned reward"
OPTIMUM, OPTIMUM_LEARNED = "optimum", "optimum of the learned reward"
NUM_TEXTS, NUM_PAIRS, NUM_UPDATES, RATE, PPO_RATE = 4096, 4096, 40, 1e-3, 3e-3
MARKS = (1 / 2, 1)  # the shares of a training after which its policy is measured
Run = dict[str, Any]  # seed, method, beta, and the points [[KL, reward], ...] at the marks


def prepare_process() -> None:
    """Limits this process to one thread, and turns off progress bars, warnings and logs, which would mix with the
    printed results."""
    torch.set_num_threads(1)
    disable_progress_bar()
    logging.disable(logging.WARNING)  # advice about runs whose beta is low on purpose
    warnings.filterwarnings("ignore")


def all_runs(seed: int) -> list[Run]:
    """Returns the results of all runs of a seed: the KL divergence and reward of each policy. Also prints each result
    as soon as it is known, as a line of JSON."""
    found = []
    for run in runs(seed):
        print(json.dumps(run), flush=True)
        found.append(run)
    return found


def runs(seed: int) -> Iterator[Run]:
    """Trains a policy with every method and beta, and yields the result of each: the points (KL divergence, reward) of
    the policy at the shares of its training that MARKS lists.

    Everything random depends on `seed`: the language, the prompts, the weights, the sampled answers and their order.
    """
    started = time.process_time()
    training, held_out = every_prompt(seed)
    texts = every_text(held_out)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = _reference(folder, training, seed)
        ref_logps, rewards = every_logp(reference, held_out), true_reward(texts)
        groups = groups_of(preferences(reference, training, NUM_PAIRS, seed))
        reward_model = load_reward_model(folder, seed=seed)
        _finish(steps(RewardBradleyTerry(), reward_model, groups, rate=2 * RATE, epochs=2, seed=seed))

        def learned_reward(texts: Tensor) -> Tensor:
            with torch.no_grad():
                outputs: Tensor = reward_model.score(reward_model.model(input_ids=texts).last_hidden_state[:, -1])
            return outputs[:, 0]

        def run(method: str, beta: float, policy: PreTrainedModel, done: Iterator[float]) -> Run:
            points = [measure(every_logp(policy, held_out), ref_logps, rewards) for _ in _marks(done)]
            return _run(seed, method, beta, *points)

        yield _run(seed, "reference", 0, measure(ref_logps, ref_logps, rewards))
        learned = torch.stack([learned_reward(each) for each in texts])
        for beta in OPTIMUM_BETAS:
            for method, maximized in ((OPTIMUM, rewards), (OPTIMUM_LEARNED, learned)):
                yield _run(seed, method, beta, measure(optimum(ref_logps, maximized, beta), ref_logps, rewards))
        for objective in OBJECTIVES:
            policy = load_policy(folder)
            done = steps(objective, policy, groups, rate=RATE, epochs=2, seed=seed)
            yield run(objective.type.upper(), objective.beta, policy, done)
        for beta in PPO_BETAS:
            for method, reward in ((PPO_TRUE, true_reward), (PPO_LEARNED, learned_reward)):
                policy = load_policy(folder)
                options = {"beta": beta, "rate": PPO_RATE, "num": NUM_UPDATES, "seed": seed}
                yield run(method, beta, policy, ppo.updates(folder, policy, reward, training, **options))
    yield {"seed": seed, "method": "CPU seconds", "beta": 0, "points": [[0, time.process_time() - started]]}


def _reference(folder: Path, prompts: Tensor, seed: int) -> PreTrainedModel:
    """Trains a random model on texts that stand for people's texts. Saves this model, the reference, to `folder`, and
    returns it."""
    save_random_model(folder, seed)
    model = load_policy(folder)
    groups = groups_of(human_texts(prompts, NUM_TEXTS, seed)[:, None])
    _finish(steps(Supervised(), model, groups, rate=3 * RATE, epochs=5, seed=seed))
    model.save_pretrained(folder)
    return model


def _finish(done: Iterator[float]) -> None:
    for _ in done:
        pass


def _marks(done: Iterator[float]) -> Iterator[float]:
    """Runs a training, and pauses it at the shares that MARKS lists.

    `done` trains, and yields after each step the share of the training that is done. This function yields the first
    share that reaches each mark; the caller then measures the policy.
    """
    marks = list(MARKS)
    for share in done:
        if marks and share >= marks[0]:
            yield marks.pop(0)


def _run(seed: int, method: str, beta: float, *points: Point) -> Run:
    return {"seed": seed, "method": method, "beta": beta, "points": [[point.kl, point.reward] for point in points]}
