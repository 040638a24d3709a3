"""Tests reward models, a linear head read at the last token of each completion, and the objectives that train them."""

import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from pydantic import TypeAdapter, ValidationError
from transformers import AutoModelForSequenceClassification

from dpo_core import options as o
from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.data.groups import Group
from dpo_core.encoding.encode import EncodedGroup, encode_group
from dpo_core.models.model import check_model, load_reward_model, load_tokenizer, merge_adapter
from dpo_core.objectives.losses import Statistics, check_groups, losses
from dpo_core.objectives.metrics import compute_metrics
from dpo_core.policy.measures import Measures
from dpo_core.policy.scorer import Scorer
from dpo_core.training.trainer import train

PAIR = EncodedGroup([1], ([2, 3], [4]), None, 1)
RANKING = EncodedGroup([1], ([2], [3], [4]), None, 2)
RATED = replace(RANKING, ratings=(2.0, 0.5, 0.5))
OBJECTIVES = [o.RewardBradleyTerry(), o.RewardRegression(), o.RewardGaussian()]
STRETCHED = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}  # prompts are not shared


@pytest.fixture
def make_reward_model(make_policy, tokenizer, tmp_path):
    def make(num_outputs: int = 1, adapter: Lora | None = None, **overrides):
        make_policy(0, **overrides).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return load_reward_model(tmp_path / "base", num_outputs=num_outputs, adapter=adapter)

    return make


@pytest.fixture
def rated(make_groups) -> list[EncodedGroup]:
    return [replace(group, ratings=(1.5, 0.5, -1.0)) for group in make_groups(8, 3)]


def config_of(objective, *, steps=4, rate=1e-3, **options) -> TrainConfig:
    optim = Optim(learning_rate=rate, warmup_ratio=0.0)
    sizes = {"batch_size": 8, "n_epochs": steps, "max_length": 64, "checkpoint_steps": steps}
    return TrainConfig(objective=objective, optim=optim, **(sizes | options))


def run(config, model, tokenizer, groups, folder, steps=4, **kwargs):
    return list(train(config, model, tokenizer, [groups] * steps, total_steps=steps, checkpoint_dir=folder, **kwargs))


def plain_outputs(model, groups) -> torch.Tensor:
    """Returns the outputs [K, outputs] of K completions, computed by transformers alone, one row at a time."""
    rows = [[*group.prompt_ids, *completion] for group in groups for completion in group.completion_ids]
    return torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])


# --- formulas ------------------------------------------------------------------------------


def loss(objective, outputs, group) -> float:
    found = torch.tensor([[*each, 0.0, 0.0][:3] for each in outputs], dtype=torch.float64)
    return losses(objective, Measures([group], found), Statistics()).item()


def nll(x: float) -> float:
    """Returns -log sigmoid(x)."""
    return math.log1p(math.exp(-x))


def miss(lead: float, *log_variances: float) -> float:
    """Returns -log of the probability that a Gaussian with the mean `lead` is above 0. Its variance is the sum of
    variances."""
    return -math.log(NormalDist().cdf(lead / math.sqrt(sum(map(math.exp, log_variances)))))


@pytest.mark.parametrize(
    ("objective", "outputs", "group", "expected"),
    [
        (o.RewardBradleyTerry(), [(2,), (0.5,)], PAIR, nll(1.5)),
        (o.RewardBradleyTerry(), [(2,), (0.5,)], replace(PAIR, margin=0.7), nll(0.8)),
        (o.RewardBradleyTerry(), [(2,), (0.5,), (1,)], RANKING, (nll(1.5) + nll(1) + nll(-0.5)) / 3),
        (o.RewardBradleyTerry(), [(2,), (0.5,), (1,)], RATED, (nll(1.5) + nll(1)) / 2),  # a tie is no pair
        (o.RewardRegression(), [(1,), (0,), (2,)], RATED, (1 + 0.25 + 2.25) / 3),
        (o.RewardRegression(), [(1,), (0,)], replace(PAIR, ratings=(1.0, 1.0)), 0.5),
        (o.RewardGaussian(), [(2, 0.3), (0.5, -1)], PAIR, miss(1.5, 0.3, -1)),
        (o.RewardGaussian(), [(2, 0), (0.5, 1), (1, -1)], RATED, (miss(1.5, 0, 1) + miss(1, 0, -1)) / 2),
    ],
)
def test_the_papers_formula(objective, outputs, group, expected):
    assert loss(objective, outputs, group) == pytest.approx(expected)


@pytest.mark.parametrize("lead", [-1e5, -1e3, -30.0, 1e5])
def test_a_gaussian_far_off_has_the_slope_of_its_formula(lead):
    """-log Phi(z) is about z^2 / 2 far below 0, and about 0 far above."""
    found = torch.tensor([[lead, -math.log(2), 0], [0, -math.log(2), 0]], requires_grad=True)
    losses(o.RewardGaussian(), Measures([PAIR], found), Statistics()).sum().backward()
    assert found.grad[0, 0].item() == pytest.approx(min(0, lead), rel=2e-3)


@pytest.mark.parametrize("log_variance", [-20.0, 200.0])
def test_a_variance_far_from_1_leaves_finite_gradients(log_variance):
    found = torch.tensor([[1.0, log_variance, 0], [0.5, log_variance, 0]], requires_grad=True)
    losses(o.RewardGaussian(), Measures([PAIR], found), Statistics()).sum().backward()
    assert found.grad.isfinite().all()


@pytest.mark.parametrize(
    ("objective", "group", "message"),
    [
        (o.RewardBradleyTerry(), replace(PAIR, completion_ids=([2],)), "Line 1 has 1 completions; .* at least 2"),
        (o.RewardBradleyTerry(), replace(PAIR, ratings=(1.0, 1.0)), "Line 1 has the same rating for all completions"),
        (
            o.RewardBradleyTerry(),
            replace(RANKING, margin=1.0),
            "Line 2 has a margin, which 'reward_bradley_terry' cannot use",
        ),
        (o.RewardRegression(), PAIR, "Line 1 has no ratings; 'reward_regression' learns only from ratings"),
        (o.RewardRegression(), replace(PAIR, ratings=(1.0, math.nan)), "Line 1 has a completion with the rating nan"),
        (
            o.RewardRegression(),
            replace(PAIR, ratings=(math.inf, 1.0)),
            r"Line 1 has the ratings \[inf, 1.0\]; .* finite",
        ),
        (o.RewardRegression(), replace(RATED, margin=1.0), "Line 2 has a margin, which 'reward_regression' cannot use"),
        (o.RewardGaussian(), replace(PAIR, margin=1.0), "Line 1 has a margin, which 'reward_gaussian' cannot use"),
        (o.RewardGaussian(), replace(RATED, ratings=(1.0, 2.0, 0.0)), "Line 2 has completions in the wrong order"),
    ],
)
def test_a_group_that_the_objective_cannot_learn_from_is_refused_by_line(objective, group, message):
    with pytest.raises(ValueError, match=message):
        check_groups(objective, [group])


def test_equal_ratings_teach_a_regression():
    check_groups(o.RewardRegression(), [replace(PAIR, ratings=(1.0, 1.0))])


def test_mpo_admits_no_reward_model():
    parts = (o.Dpo(), o.RewardBradleyTerry())
    with pytest.raises(
        o.InvalidOption,
        match="objectives is reward_bradley_terry; it must be a list of objectives that learn from pairs",
    ):
        o.Mpo(objectives=parts, weights=(1.0, 1.0))
    with pytest.raises(ValidationError):
        TypeAdapter(o.Mpo).validate_python({"objectives": [{"type": "reward_gaussian"}], "weights": [1.0]})


# --- metrics -------------------------------------------------------------------------------


def test_metrics_have_trls_names_and_nothing_of_log_probabilities():
    found = torch.tensor([[2.0, 0, 0], [0.5, 0, 0], [-1.0, 0, 0], [1.0, 0, 0], [-4.0, 0, 0]])
    values = compute_metrics(o.RewardBradleyTerry(), Measures([PAIR, RATED], found))
    assert {key: value.item() for key, value in values.items()} == {
        "min_reward": -4,
        "mean_reward": pytest.approx(-0.3),
        "max_reward": 2,
        "accuracy": pytest.approx(2 / 3),
        "margin": pytest.approx((1.5 - 2 + 3) / 3),
    }


def test_a_gaussian_reports_its_variance_too():
    found = torch.tensor([[2.0, 0, 0], [0.5, math.log(3), 0]])
    assert compute_metrics(o.RewardGaussian(), Measures([PAIR], found))["mean_variance"].item() == pytest.approx(2)


def test_single_completions_have_no_accuracy():
    values = compute_metrics(o.RewardRegression(), Measures([EncodedGroup([1], ([2],), None, 1)], torch.zeros(1, 3)))
    assert values.keys() == {"min_reward", "mean_reward", "max_reward"}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.type)
def test_measuring_waits_for_no_device(objective):
    values = compute_metrics(objective, Measures([PAIR, RATED], torch.zeros(5, 3, device="meta")))
    assert all(value.shape == () for value in values.values())


# --- models --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_outputs", [1, 2])
@pytest.mark.parametrize("overrides", [{}, STRETCHED], ids=["shared", "alone"])
def test_rewards_and_their_gradients_are_those_of_transformers(make_reward_model, make_groups, num_outputs, overrides):
    model, groups = make_reward_model(num_outputs, **overrides), make_groups(5, 3)
    scorer = Scorer(model)
    assert scorer.shares_prompts == (not overrides)
    found, expected = scorer(scorer.collate(groups)), plain_outputs(model, groups)
    torch.testing.assert_close(found[:, :num_outputs], expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    ours, theirs = (
        torch.cat([part.flatten() for part in torch.autograd.grad((outputs * weights).sum(), model.parameters())])
        for outputs in (found[:, :num_outputs], expected)
    )
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4


def test_a_model_of_another_kind_is_refused_by_name_before_any_step(
    make_reward_model, policy, pairs, tokenizer, tmp_path
):
    reward_model = make_reward_model()
    for objective, model, message in (
        (
            o.RewardBradleyTerry(),
            policy,
            "a reward model of 1 output.*, but the model is a causal language model; use load_reward",
        ),
        (
            o.Dpo(),
            reward_model,
            r"'dpo' trains a causal language model, but the model is .* of 1 output.*; use load_policy",
        ),
        (o.RewardGaussian(), reward_model, "of 2 output.*, but the model is a reward model of 1 output.*num_outputs=2"),
    ):
        with pytest.raises(o.InvalidOption, match=message) as refused:
            run(config_of(objective), model, tokenizer, pairs, tmp_path)
        assert refused.value.field == "objective"


def test_an_adapter_leaves_the_kind_of_a_model_as_it_is(make_reward_model):
    check_model(make_reward_model(2, Lora()), o.RewardGaussian())


def test_a_regression_learns_the_ratings(make_reward_model, rated, tokenizer, tmp_path):
    model, config = make_reward_model(), config_of(o.RewardRegression(), steps=50, rate=1e-2)
    steps = run(config, model, tokenizer, rated, tmp_path / "run", steps=50)
    assert steps[-1].metrics["loss"] < 0.01 * steps[0].metrics["loss"]
    assert steps[-1].metrics["accuracy"] == 1


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.type)
def test_one_pack_is_many_packs(objective, make_reward_model, rated, tokenizer, tmp_path):
    found = []
    for budget in (8192, 64):
        model = make_reward_model(objective.traits.num_outputs)
        steps = run(config_of(objective, max_tokens_per_pack=budget), model, tokenizer, rated, tmp_path / "run")
        keys = steps[0].metrics.keys() - {"tokens_per_second", "hfu"}
        found.append([[step.metrics[key] for key in sorted(keys)] for step in steps])
    assert found[0][0] != found[0][-1]
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-4, atol=1e-5)


# --- checkpoints ---------------------------------------------------------------------------

TEXTS = [("the quick brown", " fox jumps over the dog", " fox"), ("a lazy dog", " sleeps", " and sleeps in the sun")]


@pytest.mark.parametrize("num_outputs", [1, 2])
@pytest.mark.parametrize("adapter", [None, Lora(r=4)], ids=["full", "lora"])
def test_a_checkpoint_gives_the_same_rewards_in_transformers_rows_padded_and_all(
    num_outputs, adapter, make_reward_model, tokenizer, tmp_path
):
    model = make_reward_model(num_outputs, adapter)
    groups = [encode_group(Group(prompt, tuple(texts), 1), tokenizer) for prompt, *texts in TEXTS]
    assert all(completion[-1] == tokenizer.pad_token_id for group in groups for completion in group.completion_ids)
    objective = o.RewardBradleyTerry() if num_outputs == 1 else o.RewardGaussian()
    run(config_of(objective, rate=1e-2), model, tokenizer, groups, tmp_path / "run")
    scorer = Scorer(model)
    expected = scorer(scorer.collate(groups))[:, :num_outputs]
    exported = tmp_path / "run" / "step-000004" / "model"
    if adapter:
        plain = AutoPeftModelForSequenceClassification.from_pretrained(exported, num_labels=num_outputs)
        torch.testing.assert_close(plain_outputs(plain, groups), expected, rtol=1e-4, atol=1e-4)
        merge_adapter(exported, tmp_path / "merged")
        exported = tmp_path / "merged"
    loaded = AutoModelForSequenceClassification.from_pretrained(exported)
    assert loaded.config.problem_type == "regression"
    rows = [[*group.prompt_ids, *completion] for group in groups for completion in group.completion_ids]
    padded = load_tokenizer(exported).pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    torch.testing.assert_close(loaded(**padded).logits, expected, rtol=1e-4, atol=1e-4)
    assert tokenizer.pad_token == tokenizer.eos_token  # the caller's own is as it was


@pytest.mark.parametrize("adapter", [None, Lora(r=4)], ids=["full", "lora"])
def test_resuming_repeats_the_run_bit_for_bit(adapter, make_reward_model, rated, tokenizer, tmp_path):
    config = config_of(o.RewardBradleyTerry(), checkpoint_steps=2)
    steps = run(config, make_reward_model(1, adapter), tokenizer, rated, tmp_path / "run")
    halfway = tmp_path / "run" / "step-000002"
    model = make_reward_model(1, adapter)
    rest = run(config, model, tokenizer, rated, tmp_path / "again", resume=halfway)
    assert [step.metrics["loss"] for step in rest] == [step.metrics["loss"] for step in steps[2:]]


def test_a_tokenizer_that_pads_with_eos_alone_is_refused(make_reward_model, rated, tokenizer, tmp_path):
    lone = load_tokenizer(make_reward_model().name_or_path)
    lone.bos_token = None
    with pytest.raises(ValueError, match="has no padding token other than its end token </s>; set its pad_token"):
        run(config_of(o.RewardBradleyTerry()), make_reward_model(), lone, rated, tmp_path)
