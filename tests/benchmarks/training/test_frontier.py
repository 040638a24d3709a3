"""Tests the experiment on reward and KL: its rule, its exact measures, its PPO, and its tables."""

import math

import pytest
import torch

from benchmarks.training.frontier import ppo, results
from benchmarks.training.frontier.stages import preferences, save_random_model
from benchmarks.training.frontier.task import (
    WORDS,
    every_logp,
    every_prompt,
    every_text,
    generator,
    measure,
    optimum,
    sample,
    true_reward,
)
from dpo_core import load_policy

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    save_random_model(folder, 0)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return load_policy(folder)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("the film is great and good", 1.5),
        ("the plot is not very good", 1.0),  # "not" turns round what comes right after it
        ("is not bad and very awful", -1.5),
        ("good film is . the plot", 0.0),  # a word of the prompt earns nothing
    ],
)
def test_the_rule_of_the_reward(text, reward):
    assert true_reward(torch.tensor([WORDS.index(word) for word in text.split()])).item() == reward


def test_log_probabilities_of_all_answers_are_those_of_the_model(reference):
    prompts = every_prompt(0)[1][:2]
    logps, texts = every_logp(reference, prompts), every_text(prompts)
    torch.testing.assert_close(logps.logsumexp(1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)
    some = torch.randint(texts.shape[1], (20,), generator=generator(0))
    with torch.no_grad():
        plain = reference(input_ids=texts[1, some]).logits.log_softmax(-1)[:, 1:-1]
    expected = plain.gather(2, texts[1, some, 2:, None]).sum((1, 2))
    torch.testing.assert_close(logps[1, some].float(), expected, rtol=0, atol=1e-4)


def test_no_policy_has_more_reward_minus_kl_than_the_optimum(reference):
    prompts, beta = every_prompt(0)[1][:2], 0.5
    ref_logps, rewards = every_logp(reference, prompts), true_reward(every_text(prompts))

    def value(logps):
        point = measure(logps, ref_logps, rewards)
        return point.reward - beta * point.kl

    best = optimum(ref_logps, rewards, beta)
    assert value(best) == pytest.approx(beta * (ref_logps + rewards / beta).logsumexp(1).mean().item())  # beta log Z
    noise = torch.randn(best.shape, generator=generator(0))
    others = [ref_logps, optimum(ref_logps, rewards, 0.4), optimum(ref_logps, rewards, 0.6)]
    assert all(value(other) < value(best) for other in (*others, (best + 0.1 * noise).log_softmax(1)))


def test_preferences_are_those_of_a_bradley_terry_model(reference):
    pairs = preferences(reference, every_prompt(0)[0], 5000, 0)
    assert (pairs[:, 0, :2] == pairs[:, 1, :2]).all()
    leads = true_reward(pairs[:, 0]) - true_reward(pairs[:, 1])
    for lead in (0.5, 1.0, 1.5):
        num_right, num_wrong = (leads == lead).sum().item(), (leads == -lead).sum().item()
        spread = math.sqrt(num_right + num_wrong) / 2
        expected = (num_right + num_wrong) / (1 + math.exp(-lead))
        assert num_right == pytest.approx(expected, abs=4 * spread)


@pytest.mark.slow
def test_ppo_approaches_the_optimum(folder, reference):
    training, held_out = every_prompt(0)
    policy, beta = load_policy(folder), 0.5
    for _ in ppo.updates(folder, policy, true_reward, training, beta=beta, rate=3e-3, num=30, seed=0):
        pass
    ref_logps, rewards = every_logp(reference, held_out), true_reward(every_text(held_out))
    found = measure(every_logp(policy, held_out), ref_logps, rewards)
    at_start = measure(ref_logps, ref_logps, rewards).reward
    best = measure(optimum(ref_logps, rewards, beta), ref_logps, rewards)
    assert found.reward - beta * found.kl - at_start > 0.7 * (best.reward - beta * best.kl - at_start)


def test_samples_follow_the_policy(reference):
    prompt = every_prompt(0)[1][:1]
    texts = sample(reference, prompt.expand(4000, -1), generator(0))
    expected = true_reward(every_text(prompt)) * every_logp(reference, prompt).exp()
    rewards = true_reward(texts)
    assert rewards.mean().item() == pytest.approx(expected.sum().item(), abs=4 * rewards.std().item() / 4000**0.5)


def test_methods_are_compared_at_equal_kl_seed_by_seed(capsys):
    found = [{"seed": 0, "method": "reference", "beta": 0, "points": [[0.0, 0.0]]}]
    for seed, lift in enumerate((0.0, 1.0)):
        for method, beta, points in (
            ("DPO", 1.0, [[0.5, lift], [1.0, lift + 2.0]]),
            ("IPO", 1.0, [[0.5, lift + 0.5], [2.0, lift + 2.0], [1.9, lift + 0.4]]),  # the last one is no frontier's
        ):
            found.append({"seed": seed, "method": method, "beta": beta, "points": points})
    results.print_at_equal_kl(found)
    rewards, differences = capsys.readouterr().out.strip().split("\n\n")
    assert "| DPO | 2.50 ± 6.35 |  |  |  |" in rewards
    assert "| IPO | -1.00 ± 0.00 |  |  |  |" in differences
