"""Tests where training ends on a vocabulary of two tokens.

It must end at the optimum that the objective's paper states, or at the minimum of its loss.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from dpo_core import options as o
from dpo_core.config import Optim, TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.training.trainer import train

PROMPT = [0, 1, 1]
A, B = [0], [1]  # the two completions of one token: their probabilities sum to 1
SHARES = torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:-1]  # every probability of A, to five digits


def trained(objective, rows, tokenizer, make_policy, folder, completions=(A, B)):
    """Trains for 200 steps on all rows, and returns the log-probabilities of the completions."""
    policy = make_policy(
        0, vocab_size=2, hidden_size=16, num_hidden_layers=1, bos_token_id=0, eos_token_id=1, initializer_range=0.1
    )
    config = TrainConfig(
        objective=objective,
        optim=Optim(learning_rate=5e-3, warmup_ratio=0.0, schedule="cosine"),
        batch_size=len(rows),
        n_epochs=1,
        checkpoint_steps=1000,
    )
    list(train(config, policy, tokenizer, [rows] * 200, total_steps=200, checkpoint_dir=folder))
    whole = torch.tensor([[*PROMPT, *completion] for completion in completions])
    token_logps = policy(input_ids=whole).logits.log_softmax(-1)[:, len(PROMPT) - 1 : -1]
    return token_logps.gather(2, whole[:, len(PROMPT) :, None]).sum((1, 2)).detach()


def disputed(better, worse, share, ref_logps):
    """Returns a pair with both orders: `share` of people prefer `better`, and the others `worse`."""
    return [
        EncodedGroup(PROMPT, (better, worse), ref_logps, 1, weight=2 * share),
        EncodedGroup(PROMPT, (worse, better), ref_logps[::-1], 2, weight=2 * (1 - share)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_dpo_ends_at_the_optimum_of_reward_and_kl(tokenizer, make_policy, tmp_path, beta):
    """arXiv 2305.18290, equation 4 and theorem 1: the policy becomes pi_ref exp(r / beta) / Z if people prefer answers
    as a Bradley-Terry model with the reward r does. Here these are all eight answers of three tokens."""
    completions = [list(ids) for ids in itertools.product((0, 1), repeat=3)]
    rewards = torch.tensor([1.0, -0.5, 0.3, 0.0, -1.0, 0.8, -0.2, 0.5])
    reference = torch.tensor([0.05, 0.2, 0.1, 0.15, 0.2, 0.05, 0.15, 0.1]).log()
    rows = []
    for i, j in itertools.combinations(range(len(completions)), 2):
        share, ref_logps = (rewards[i] - rewards[j]).sigmoid().item(), (reference[i].item(), reference[j].item())
        rows += disputed(completions[i], completions[j], share, ref_logps)
    found = trained(o.Dpo(beta=beta), rows, tokenizer, make_policy, tmp_path, completions)
    optimum = (reference + rewards / beta).log_softmax(0)
    assert (found.exp() - optimum.exp()).abs().sum() / 2 < 1e-3  # total variation
    assert (optimum.exp() * (optimum - found)).sum() < 1e-5  # KL, nats


@pytest.mark.slow
@pytest.mark.parametrize(("length_average", "tokens"), [(False, 1), (True, 2)], ids=["summed", "per token"])
def test_ipo_stops_when_the_margin_is_the_preference(tokenizer, make_policy, tmp_path, length_average, tokens):
    """arXiv 2310.12036: p (d - 1 / (2 tau))^2 + (1 - p) (-d - 1 / (2 tau))^2 is least where d = (2 p - 1) / (2 tau)."""
    share, tau = 0.8, 0.25
    pair, ref_logps = ([0, 1], [1, 0]), (-1.7, -1.1)
    rows = disputed(*pair, share, ref_logps)
    objective = o.Ipo(beta=tau, length_average=length_average)
    chosen, rejected = trained(objective, rows, tokenizer, make_policy, tmp_path, pair) - torch.tensor(ref_logps)
    assert chosen - rejected == pytest.approx(tokens * (2 * share - 1) / (2 * tau), abs=1e-3)


@pytest.mark.slow
def test_ipo_tilts_the_reference_by_how_often_each_completion_is_preferred(tokenizer, make_policy, tmp_path):
    """arXiv 2310.12036: the optimum is pi_ref exp(p(y > mu) / tau) / Z, here with a uniform mu.

    No reward explains these preferences: the second completion beats the third, the third the fourth, and the fourth
    the second.
    """
    tau, completions = 0.5, [list(ids) for ids in itertools.product((0, 1), repeat=2)]
    beats = {(0, 1): 0.6, (0, 2): 0.7, (0, 3): 0.8, (1, 2): 0.9, (2, 3): 0.9, (1, 3): 0.1}
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    rows, preferred = [], [0.5 / 4] * 4  # over itself
    for (i, j), share in beats.items():
        rows += disputed(completions[i], completions[j], share, (reference[i].item(), reference[j].item()))
        preferred[i] += share / 4
        preferred[j] += (1 - share) / 4
    objective = o.Ipo(beta=tau, length_average=False)
    found = trained(objective, rows, tokenizer, make_policy, tmp_path, completions)
    optimum = (reference + torch.tensor(preferred) / tau).softmax(0)
    torch.testing.assert_close(found.exp(), optimum, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_kto_favours_what_most_people_prefer_when_dpo_follows_the_reference(tokenizer, make_policy, tmp_path):
    """arXiv 2402.01306, on contradictory preferences with p^(1 / beta) pi_ref(A) < (1 - p)^(1 / beta) pi_ref(B).

    DPO's optimum prefers B, and KTO's optimum is A alone.
    """
    share, beta, reference = 0.7, 0.5, (0.1, 0.9)
    ref_logps = (math.log(reference[0]), math.log(reference[1]))
    rows = disputed(A, B, share, ref_logps)
    odds = reference[0] / reference[1] * (share / (1 - share)) ** (1 / beta)
    assert odds < 1
    dpo = trained(o.Dpo(beta=beta), rows, tokenizer, make_policy, tmp_path)
    with_others = [  # B, which is found less and less: z0 is 0
        replace(
            row,
            completion_ids=(*row.completion_ids, B),
            ref_logps=(*row.ref_logps, ref_logps[1]),
            ratings=(1.0, 0.0, math.nan),
        )
        for row in rows
    ]
    kto = trained(o.Kto(beta=beta), with_others, tokenizer, make_policy, tmp_path)
    assert dpo.exp()[0] == pytest.approx(odds / (1 + odds), abs=1e-3)
    assert kto.exp()[0] > 0.99


@pytest.mark.parametrize("other", [0, 1], ids=["z0 follows A", "z0 stays 0"])
def test_kto_divides_the_policy_between_two_desirable_completions(tokenizer, make_policy, tmp_path, other):
    """With beta 1, a completion lowers the loss by gain · pi / (pi + e pi_ref). e = exp(z0) has no gradient.

    The gain is how much the completion is liked minus how much it is blamed. Training ends where the slopes of both
    completions are equal.
    """
    reference, likes, dislikes, blame = (0.4, 0.6), (4.0, 2.0), (2.0, 0.5), 0.5
    rows = [
        EncodedGroup(
            PROMPT,
            ([own], [other]),
            (math.log(reference[own]), math.log(reference[other])),
            1,
            ratings=(rating, math.nan),
            weight=people[own],
        )
        for own in (0, 1)
        for rating, people in ((1.0, likes), (0.0, dislikes))
    ]
    found = trained(o.Kto(beta=1, undesirable_weight=blame), rows, tokenizer, make_policy, tmp_path)
    shares = (SHARES, 1 - SHARES)
    e = (shares[other] / reference[other]).clamp(min=1)
    slopes = [(likes[i] - blame * dislikes[i]) * e * reference[i] / (shares[i] + e * reference[i]) ** 2 for i in (0, 1)]
    expected = SHARES[(slopes[0] - slopes[1]).abs().argmin()].item()
    assert expected == pytest.approx(0.73 if other == 0 else 0.63, abs=0.01)
    assert found.exp()[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("odds_weight", [0.1, 1.0])
def test_orpo_ends_between_the_shares_of_people_and_their_odds(tokenizer, make_policy, tmp_path, odds_weight):
    """arXiv 2403.07691, equation 6.

    Likelihood alone would end where the policy equals the people's share. Odds alone would end where the square of the
    policy's odds equals their odds.
    """
    share = 0.9
    odds = SHARES.logit() - (1 - SHARES).logit()
    loss = -share * (SHARES.log() + odds_weight * logsigmoid(odds))
    loss -= (1 - share) * ((1 - SHARES).log() + odds_weight * logsigmoid(-odds))
    rows = disputed(A, B, share, (0.0, 0.0))
    found = trained(o.Orpo(odds_weight=odds_weight), rows, tokenizer, make_policy, tmp_path)
    expected = SHARES[loss.argmin()].item()
    assert 0.75 < expected < share - 0.01
    assert found.exp()[0] == pytest.approx(expected, abs=1e-3)
