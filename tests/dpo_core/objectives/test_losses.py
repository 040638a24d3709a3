import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_core import options as o
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.objectives.losses import LOSSES, Statistics, check_groups, denominator, losses
from dpo_core.policy.measures import Measures

PAIR = EncodedGroup([1], ([2, 3], [4]), (-5.0, -7.0), 1, ref_head_logps=(-2.0, -7.0))
SINGLE = EncodedGroup([1], ([2, 3],), None, 1)
OTHER_PROMPT = EncodedGroup([1], ([2], [4], [5]), (-5, -7, -1), 1, ratings=(1.0, 0.0, math.nan))
LOGPS = st.floats(-50, -0.01)
LN2 = pytest.approx(math.log(2))


def loss(objective, logps, group=PAIR, heads=None) -> float:
    found = torch.tensor([[a, b, 0] for a, b in zip(logps, heads or logps, strict=True)], dtype=torch.float64)
    return losses(objective, Measures([group], found), Statistics()).item()


def nll(x: float) -> float:
    """Returns -log sigmoid(x)."""
    return math.log1p(math.exp(-x)) if x > -700 else -x


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@given(chosen=LOGPS, rejected=LOGPS, beta=st.floats(0.01, 2))
def test_dpo_is_equation_7(chosen, rejected, beta):
    expected = nll(beta * ((chosen + 5) - (rejected + 7)))
    assert loss(o.Dpo(beta=beta), (chosen, rejected)) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    "objective", [o.Dpo(), o.Cdpo(), o.RobustDpo(), o.DpoNorm(), o.FDpo(), o.LdDpo(), o.Aot(), o.Dpop()]
)
def test_a_policy_that_equals_its_reference_loses_ln_2(objective):
    assert loss(objective, PAIR.ref_logps, heads=PAIR.ref_head_logps) == LN2


# h_w = 2 over two tokens, h_l = -1 over one: delta = 3, per token 1 - (-1) = 2.
@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (o.Cdpo(beta=0.5, label_smoothing=0.2), 0.8 * nll(1.5) + 0.2 * nll(-1.5)),
        (o.RobustDpo(beta=0.5, label_smoothing=0.2), (0.8 * nll(1.5) - 0.2 * nll(-1.5)) / 0.6),
        (o.Ipo(beta=0.1), (2 - 5) ** 2),
        (o.Ipo(beta=0.1, length_average=False), (3 - 5) ** 2),
        (o.Hinge(beta=0.1), 0.7),
        (o.Hinge(beta=0.5), 0),
        (o.DpoNorm(beta=0.5), nll(1)),
        (o.ApoZero(beta=0.5), 1 - sigmoid(1) + sigmoid(-0.5)),
        (o.ApoDown(beta=0.5), sigmoid(1) + 1 - sigmoid(1.5)),
        (o.Nca(beta=0.5), nll(1) + nll(-1) / 2 + nll(0.5) / 2),
        (o.Sppo(beta=0.5), (2 - 1) ** 2 + (-1 + 1) ** 2),
        (o.Dpop(beta=0.5), nll(1.5)),
        (o.Rpo(beta=0.5, nll_weight=2), nll(1.5) + 2 * 3 / 2),
        (o.RDpo(beta=0.5, length_weight=0.1), nll(1.6)),
        (o.FDpo(beta=0.5, divergence="forward_kl"), nll(0.5 * (math.exp(1) - math.exp(-2)))),
        (o.FDpo(beta=0.5, divergence="alpha"), nll(0.5 * 2 * (math.exp(0.5) - math.exp(-1)))),
        (o.Cpo(beta=0.5, nll_weight=2), nll(0.5 * (-3 + 8)) + 2 * 3 / 2),
        (o.Cpo(beta=0.5, nll_weight=2, length_average=False), nll(0.5 * (-3 + 8)) + 2 * 3),
        (o.Simpo(beta=2, gamma_beta_ratio=0.5), nll(2 * (-1.5 + 8) - 1)),
        (o.Kto(beta=0.5), (1 - sigmoid(1) + 1 - sigmoid(0.5)) / 2),
        (o.Bco(beta=0.5), nll(1 - 0.25) + nll(0.25 + 0.5)),
        (o.Lipo(beta=0.5), (1 / math.log(2) - 1 / math.log(3)) * nll(1.5)),
        (o.Mpo(objectives=(o.Dpo(beta=0.5), o.Supervised()), weights=(0.5, 2)), 0.5 * nll(1.5) + 2 * 3 / 2),
    ],
)
def test_the_papers_formula(objective, expected):
    assert loss(objective, (-3, -8)) == pytest.approx(expected, rel=1e-6)


def test_ld_dpo_weighs_the_tail_in_both_policy_and_reference():
    # head h_w = -1 - (-2) = 1, whole h_w = 2, so 1 + 0.25 * 1; the shorter completion is all head.
    found = loss(o.LdDpo(beta=0.5, tail_weight=0.25), (-3, -8), heads=(-1, -8))
    assert found == pytest.approx(nll(0.5 * (1.25 + 1)))


@given(h=st.lists(st.floats(-20, 20), min_size=2, max_size=6), beta=st.floats(0.05, 1))
def test_dpo_on_a_ranking_is_plackett_luce(h, beta):
    group = EncodedGroup([1], tuple([2] for _ in h), (0.0,) * len(h), 1)
    choices = [math.log(sum(math.exp(beta * (x - h[i])) for x in h[i:])) for i in range(len(h) - 1)]
    assert loss(o.Dpo(beta=beta), h, group) == pytest.approx(sum(choices), abs=1e-8)
    average = loss(o.Dpo(beta=beta, mean_over_choices=True), h, group)
    assert average == pytest.approx(sum(choices) / len(choices), abs=1e-8)


def test_a_tie_says_nothing_about_its_members():
    group = EncodedGroup([1], ([2], [3], [4]), (0.0, 0.0, 0.0), 1, ratings=(1.0, 1.0, 0.0))
    assert loss(o.Dpo(beta=1), (2, -3, 0.5), group) == pytest.approx(nll(1.5) + nll(-3.5))


def test_groups_of_several_sizes_can_be_in_one_batch():
    ranking = EncodedGroup([1], ([2], [3], [4]), (0.0, 0.0, 0.0), 2)
    found = torch.tensor([[x, x, 0] for x in (-3, -8, 1, 0, -1)], dtype=torch.float64)
    both = losses(o.Dpo(), Measures([PAIR, ranking], found), Statistics()).tolist()
    assert both == pytest.approx([loss(o.Dpo(), (-3, -8)), loss(o.Dpo(), (1, 0, -1), ranking)])


def test_the_chosen_completion_must_lead_by_the_margin():
    assert loss(o.Dpo(beta=0.5), (-3, -8), replace(PAIR, margin=1.0)) == pytest.approx(nll(0.5))


def test_kto_measures_against_completions_of_other_prompts_without_gradient():
    groups = [
        EncodedGroup([1], ([2], [3]), (0.0, 0.0), 1, ratings=(1.0, math.nan)),
        EncodedGroup([1], ([2], [3]), (0.0, 0.0), 2, ratings=(0.0, math.nan)),
    ]
    found = torch.tensor([[2.0, 0, 0], [3.0, 0, 0], [-1.0, 0, 0], [1.0, 0, 0]], requires_grad=True)
    each = losses(o.Kto(beta=1, undesirable_weight=2), Measures(groups, found), Statistics())
    assert each.tolist() == pytest.approx([1 - sigmoid(0), 2 * (1 - sigmoid(3))])
    each.sum().backward()
    assert found.grad[[1, 3], 0].tolist() == [0, 0]


def test_bco_keeps_the_mean_of_all_rewards_so_far():
    statistics = Statistics()
    for logps in ((-3, -8), (-5, -7)):
        found = torch.tensor([[x, x, 0] for x in logps], dtype=torch.float64)
        last = losses(o.Bco(beta=1), Measures([PAIR], found), statistics).item()
    assert vars(statistics) == {"mean": pytest.approx((2 - 1 + 0 + 0) / 4), "count": 4}
    assert last == pytest.approx(nll(-0.25) + nll(0.25))


def test_orpo_is_finite_if_every_token_is_certain():
    found = torch.tensor([[0.0, 0, 0], [-1e-9, 0, 0]], requires_grad=True)
    each = losses(o.Orpo(), Measures([PAIR], found), Statistics())
    each.sum().backward()
    assert each.isfinite().all()
    assert found.grad.isfinite().all()


def test_orpo_is_equation_6():
    p, q = math.exp(-1.5), math.exp(-8)
    odds = math.log(p / (1 - p)) - math.log(q / (1 - q))
    assert loss(o.Orpo(odds_weight=0.1), (-3, -8)) == pytest.approx(1.5 + 0.1 * nll(odds))


@pytest.mark.parametrize("name", [*LOSSES, "bco", "mpo"])
def test_gradients_are_those_of_finite_differences(name):
    group = SINGLE if name == "supervised" else PAIR
    found = torch.tensor([[-4.0, -1.7, 0], [-6.4, -6.4, 0]], dtype=torch.float64)[: len(group.completion_ids)]
    objective = o.OBJECTIVES[name]()
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        slope = torch.func.grad(lambda x: losses(objective, Measures([group], x), Statistics()).sum())(found)
    if name in ("bco", "mpo"):
        return  # delta is without gradient, and differences would move it
    for place in range(len(found)):
        nudge = torch.zeros_like(found)
        nudge[place, :2] = 1e-6
        rise, fall = (losses(objective, Measures([group], found + s * nudge), Statistics()).item() for s in (1, -1))
        assert slope[place, :2].sum().item() == pytest.approx((rise - fall) / 2e-6, rel=1e-4, abs=1e-6)


def test_the_denominator_counts_tokens_for_supervised_and_groups_for_the_others():
    assert denominator(o.Supervised(), [PAIR, PAIR]) == 6
    assert denominator(o.Dpo(), [PAIR, PAIR]) == 2


@pytest.mark.parametrize(
    ("objective", "group", "message"),
    [
        (o.Supervised(), PAIR, "Line 1 has 2 completions; the method 'supervised' needs exactly 1"),
        (
            o.Ipo(),
            EncodedGroup([1], ([1], [2], [3]), None, 1),
            "Line 1 has 3 completions; the method 'ipo' needs exactly 2",
        ),
        (o.Dpo(), SINGLE, "Line 1 has 1 completions; the method 'dpo' needs at least 2"),
        (o.Dpo(), replace(PAIR, ref_logps=None), "Line 1 has no ref_logps .* compute them with score_reference"),
        (
            o.LdDpo(),
            replace(PAIR, ref_head_logps=None),
            "Line 1 has no ref_head_logps .* compute them with score_reference",
        ),
        (o.Dpo(), replace(PAIR, ratings=(1.0, 1.0)), "Line 1 has the same rating for all completions"),
        (o.Simpo(), replace(PAIR, margin=1.0), "Line 1 has a margin, which 'simpo' cannot use"),
        (
            o.Supervised(),
            replace(SINGLE, margin=1.0),
            "Line 1 has a margin, which 'supervised' cannot use",
        ),
        (
            o.Dpo(),
            replace(PAIR, ratings=(0.0, 1.0)),
            "Line 1 has completions in the wrong order; put the one with the highest rating first",
        ),
        (o.Kto(), replace(OTHER_PROMPT, ratings=(1.0, math.nan, 0.0)), "Line 1 has completions in the wrong order"),
        (o.Ipo(), OTHER_PROMPT, "Line 1 has a completion with the rating nan .*, which 'ipo' cannot use"),
        (
            o.Supervised(),
            replace(PAIR, ratings=(1.0, math.nan)),
            "Line 1 has a completion with the rating nan .*, which 'supervised' cannot use",
        ),
        (
            o.Bco(),
            replace(PAIR, ratings=(math.nan, math.nan)),
            "Line 1 has 0 completions; the method 'bco' needs at least 1",
        ),
    ],
)
def test_a_group_that_the_objective_cannot_learn_from_is_refused_by_line(objective, group, message):
    with pytest.raises(ValueError, match=message):
        check_groups(objective, [group])


def test_an_unpaired_objective_reads_ratings_in_any_order():
    check_groups(o.Bco(), [replace(PAIR, ratings=(0.0, 1.0))])


@pytest.mark.parametrize("objective", [o.Kto(), o.Mpo(objectives=(o.Dpo(), o.Kto()), weights=(1.0, 1.0))])
def test_kto_needs_completions_of_other_prompts_in_the_global_batch(objective):
    with pytest.raises(
        ValueError, match=f"which the method '{objective.type}' needs; add completions of other prompts"
    ):
        check_groups(objective, [PAIR, PAIR])
    check_groups(objective, [PAIR, OTHER_PROMPT])


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_waits_for_the_device(name):
    found = torch.zeros(4, 3, device="meta")  # which has no values to wait for
    groups = [PAIR, replace(PAIR, ratings=(1.0, 0.0))]
    assert losses(o.OBJECTIVES[name](), Measures(groups, found), Statistics()).shape == (2,)


@pytest.mark.parametrize(
    ("make", "field", "message"),
    [
        (lambda: o.Dpo(beta=3), "beta", "beta is 3; it must be greater than 0 and at most 2."),
        (lambda: o.Kto(undesirable_weight=0), "undesirable_weight", "greater than 0 and finite"),
        (lambda: o.Rpo(nll_weight=math.nan), "nll_weight", "0 or more and finite"),
        (lambda: o.FDpo(divergence="alpha", alpha=1), "alpha", "greater than 0 and less than 1"),
        (lambda: o.FDpo(alpha=0.3), "alpha", "'alpha' is 0.3, but only the divergence 'alpha' uses"),
    ],
)
def test_an_option_beyond_its_limit_is_refused_by_name(make, field, message):
    with pytest.raises(o.InvalidOption, match=message) as refused:
        make()
    assert refused.value.field == field


AOTS = [o.Aot(beta=0.5), o.Aot(beta=0.5, paired=False, label_smoothing=0.1), o.Mpo(objectives=(o.Aot(),), weights=(2,))]


def weighted(objective, weights, logps):
    """Returns the sum of the losses of pairs with these weights, and its gradient with respect to their
    log-probabilities."""
    groups = [replace(PAIR, ref_logps=(-5.0 - n, -7.0), weight=weight) for n, weight in enumerate(weights)]
    found = torch.tensor([[x, x, 0] for x in logps], dtype=torch.float64, requires_grad=True)
    measures = Measures(groups, found)
    total = (losses(objective, measures, Statistics()) * measures.weights).sum()
    (slope,) = torch.autograd.grad(total, found)
    return total.item(), slope[:, 0].view(-1, 2)


@pytest.mark.parametrize("objective", AOTS, ids=str)
def test_aot_honours_weights_a_pair_of_weight_2_counting_as_two_of_weight_1(objective):
    logps = [-3, -8, -9, -2, -5, -6]
    twice = [replace(PAIR, ref_logps=(-5.0 - n, -7.0)) for n in (0, 0, 1, 2)]
    found = torch.tensor([[x, x, 0] for x in (*logps[:2], *logps)], dtype=torch.float64)
    expected = losses(objective, Measures(twice, found), Statistics()).sum().item()
    assert weighted(objective, (2, 1, 1), logps)[0] == pytest.approx(expected)


@pytest.mark.parametrize("objective", AOTS, ids=str)
def test_a_pair_of_next_to_no_weight_moves_nothing_in_aot(objective):
    with_it, slopes = weighted(objective, (1, 1, 1e-9), [-3, -8, -9, -2, 4, -6])
    without, expected = weighted(objective, (1, 1), [-3, -8, -9, -2])
    assert with_it == pytest.approx(without, rel=1e-6)
    torch.testing.assert_close(slopes[:2], expected, rtol=1e-6, atol=1e-8)
    assert slopes[2].abs().max() < 1e-8
