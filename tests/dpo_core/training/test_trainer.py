import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_core.config import Optim, TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.model import load_policy
from dpo_core.options import Aot, Bco, Dpo, Kto, Mpo, Supervised
from dpo_core.training.checkpoint import read_manifest
from dpo_core.training.trainer import train

DPO = TrainConfig(
    objective=Dpo(beta=0.5),
    optim=Optim(learning_rate=1e-2, schedule="cosine"),
    batch_size=64,
    n_epochs=1,
    max_length=64,
)
SUPERVISED = replace(DPO, objective=Supervised())


def run(config, policy, tokenizer, batches, folder, **kwargs):
    total_steps = kwargs.pop("total_steps", None) or len(batches)
    config = replace(config, checkpoint_steps=config.checkpoint_steps or 1000)
    return list(train(config, policy, tokenizer, batches, total_steps=total_steps, checkpoint_dir=folder, **kwargs))


def assert_same_policy(ours, theirs, **tolerance):
    torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), **tolerance)


def numbers(results):
    return [{k: v for k, v in r.metrics.items() if k not in ("tokens_per_second", "hfu")} for r in results]


def test_a_policy_equal_to_its_reference_has_margins_0_and_loss_ln_2(policy, tokenizer, pairs, scored, tmp_path):
    first = run(DPO, policy, tokenizer, [scored(pairs, policy)], tmp_path)[0]
    assert first.metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first.metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)


def balances(make_mixture, tokenizer, pairs, folder, **kwargs):
    """Trains a mixture of experts for four steps, with an evaluation at each second step, and returns the results."""
    config, batches = replace(DPO, checkpoint_steps=2), [pairs[:4]] * 4
    return run(config, make_mixture(), tokenizer, batches, folder, validation=lambda: [pairs[4:]], **kwargs)


def test_loss_and_eval_loss_do_not_contain_the_balance_of_experts(make_mixture, tokenizer, pairs, scored, tmp_path):
    scores = scored(pairs, make_mixture())
    first, second, *_ = balances(make_mixture, tokenizer, scores, tmp_path)
    assert 0.1 * first.metrics["aux_loss"] > 0.1
    assert first.metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    policy = load_policy(tmp_path / "step-000002" / "model")
    policy.config.router_aux_loss_coef = 0.0
    alone = run(DPO, policy, tokenizer, [scores[4:]], tmp_path / "alone")[0].metrics
    assert "aux_loss" not in alone
    assert second.metrics["eval/loss"] == pytest.approx(alone["loss"], rel=1e-5)


@pytest.mark.parametrize("before", [True, False], ids=["balanced before", "not balanced before"])
def test_a_resumed_run_that_balances_experts_as_it_did_not_before_says_so(
    before, make_mixture, tokenizer, pairs, tmp_path
):
    balances(make_mixture, tokenizer, pairs, tmp_path)
    file = tmp_path / "step-000002" / "manifest.json"
    manifest = json.loads(file.read_text())
    if not before:
        del manifest["metrics"]["aux_loss"]  # as an older release left it
        file.write_text(json.dumps(manifest))
    third, fourth = balances(make_mixture, tokenizer, pairs, tmp_path / "again", resume=tmp_path / "step-000002")
    told = (
        "The balance of the model's experts was not trained up to step 2, and is trained with coefficient 0.1 from "
        "here on; loss and eval/loss never contain the balancing loss, so they can be compared with those of earlier "
        "steps."
    )
    assert (third.warning, fourth.warning) == (None if before else told, None)


def test_training_prefers_chosen_completions(policy, tokenizer, pairs, scored, tmp_path):
    results = run(DPO, policy, tokenizer, [scored(pairs, policy)] * 8, tmp_path)
    assert results[-1].metrics["loss"] < results[0].metrics["loss"] / 2
    assert results[-1].metrics["rewards/accuracies"] == 1


def test_swapping_chosen_and_rejected_negates_margins(make_policy, tokenizer, pairs, tmp_path):
    swapped = [replace(g, completion_ids=g.completion_ids[::-1], ref_logps=g.ref_logps[::-1]) for g in pairs]
    as_is = run(DPO, make_policy(), tokenizer, [pairs], tmp_path)[0].metrics
    other = run(DPO, make_policy(), tokenizer, [swapped], tmp_path)[0].metrics
    assert other["rewards/margins"] == pytest.approx(-as_is["rewards/margins"], abs=1e-5)


@pytest.mark.slow
def test_dpo_on_bradley_terry_preferences_converges_to_the_reference_tilted_by_the_reward(
    make_policy, tokenizer, scored, tmp_path
):
    """arXiv 2305.18290, equation 4: the optimum is pi_ref exp(r / beta) / Z.

    Two tokens in two places make four completions. Their rewards make every preference 1:1, 3:1 or 9:1, so that a few
    rows represent the preferences exactly.
    """
    beta, prompt = 0.5, [0, 1, 1]
    completions = list(itertools.product((0, 1), repeat=2))
    rewards = [0.0, math.log(3), math.log(3), 2 * math.log(3)]
    rows = [
        EncodedGroup(prompt, (list(completions[i]), list(completions[j])), None, 1)
        for i, j in itertools.permutations(range(4), 2)
        for _ in range(round(math.exp(max(0, rewards[i] - rewards[j]))))
    ]
    sizes = {"vocab_size": 2, "hidden_size": 16, "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 1}
    policy = make_policy(0, **sizes)
    every = [EncodedGroup(prompt, tuple(map(list, completions)), None, 1)]
    reference = torch.tensor(scored(every, policy)[0].ref_logps)
    config = replace(DPO, objective=Dpo(beta=beta), optim=Optim(learning_rate=2e-3, warmup_ratio=0.0))
    run(config, policy, tokenizer, [scored(rows, policy)] * 100, tmp_path)
    found = torch.tensor(scored(every, policy)[0].ref_logps)
    optimum = (reference + torch.tensor(rewards) / beta).log_softmax(0)
    divergence = (found.exp() * (found - optimum)).sum().item()
    before = (reference.exp() * (reference - optimum)).sum().item()
    assert before > 0.1
    assert divergence < 1e-2


@pytest.mark.slow
def test_dpo_on_rankings_of_four_converges_to_the_same_optimum(make_policy, tokenizer, scored, tmp_path):
    """arXiv 2305.18290, A.3. The rows have every order of four completions, weighted with its Plackett-Luce
    probability."""
    beta, prompt = 0.5, [0, 1, 1]
    completions = [list(ids) for ids in itertools.product((0, 1), repeat=2)]
    rewards = [0.0, 1.0, 0.5, 1.5]

    def probability(order: tuple[int, ...]) -> float:
        odds = [math.exp(rewards[i]) for i in order]
        return math.prod(odds[place] / sum(odds[place:]) for place in range(4))

    rows = [
        EncodedGroup(prompt, tuple(completions[i] for i in order), None, 1, weight=24 * probability(order))
        for order in itertools.permutations(range(4))
    ]
    sizes = {"vocab_size": 2, "hidden_size": 16, "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 1}
    policy = make_policy(0, **sizes)
    every = [EncodedGroup(prompt, tuple(completions), None, 1)]
    reference = torch.tensor(scored(every, policy)[0].ref_logps)
    config = replace(DPO, objective=Dpo(beta=beta), optim=Optim(learning_rate=2e-3, warmup_ratio=0.0))
    run(config, policy, tokenizer, [scored(rows, policy)] * 100, tmp_path)
    found = torch.tensor(scored(every, policy)[0].ref_logps)
    optimum = (reference + torch.tensor(rewards) / beta).log_softmax(0)
    assert (reference.exp() * (reference - optimum)).sum() > 0.1
    assert (found.exp() * (found - optimum)).sum() < 1e-2


def with_completions_of_other_prompts(pairs: list[EncodedGroup], scored, reference) -> list[EncodedGroup]:
    others = [pairs[i - 1].completion_ids[0] for i in range(len(pairs))]
    groups = [
        EncodedGroup(pair.prompt_ids, (*pair.completion_ids, other), None, pair.line, ratings=(1.0, 0.0, math.nan))
        for pair, other in zip(pairs, others, strict=True)
    ]
    return scored(groups, reference)


@pytest.mark.parametrize("objective", [Aot(), Aot(paired=False), Bco(), Kto(), Mpo()], ids=lambda o: o.type)
def test_a_loss_over_the_whole_batch_is_the_same_in_one_pack_and_in_many(
    objective, make_policy, tokenizer, pairs, scored, tmp_path
):
    if objective.type == "kto":
        pairs = with_completions_of_other_prompts(pairs, scored, make_policy(1))
    config, whole, cut = replace(DPO, objective=objective), make_policy(), make_policy()
    one = run(replace(config, max_tokens_per_pack=8192), whole, tokenizer, [pairs] * 3, tmp_path / "one")
    many = run(replace(config, max_tokens_per_pack=64), cut, tokenizer, [pairs] * 3, tmp_path / "many")
    for ours, theirs in zip(numbers(one), numbers(many), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert_same_policy(whole, cut, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [DPO, SUPERVISED], ids=["dpo", "supervised"])
def test_one_pack_of_eight_groups_trains_as_many_packs_do(
    config, make_policy, tokenizer, pairs, demonstrations, tmp_path
):
    batch = pairs if config is DPO else demonstrations
    whole, cut = make_policy(), make_policy()
    one = run(replace(config, max_tokens_per_pack=8192), whole, tokenizer, [batch] * 3, tmp_path / "one")
    many = run(replace(config, max_tokens_per_pack=64), cut, tokenizer, [batch] * 3, tmp_path / "many")
    for ours, theirs in zip(numbers(one), numbers(many), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert_same_policy(whole, cut, rtol=1e-3, atol=1e-4)


def test_supervised_means_over_the_tokens_of_the_global_batch(
    policy, tokenizer, demonstrations, plain_token_logps, tmp_path
):
    token_logps = torch.cat([plain_token_logps(policy, group)[0] for group in demonstrations])
    first = run(replace(SUPERVISED, max_tokens_per_pack=64), policy, tokenizer, [demonstrations], tmp_path)[0]
    assert first.metrics["loss"] == pytest.approx(-token_logps.mean().item(), rel=1e-5)
    assert 0 <= first.metrics["mean_token_accuracy"] < 1


def test_dropout_is_off(make_policy, tokenizer, pairs, tmp_path):
    dropping = make_policy(0, attention_dropout=0.5).train()
    ours = run(DPO, dropping, tokenizer, [pairs] * 2, tmp_path / "dropping")
    theirs = run(DPO, make_policy(), tokenizer, [pairs] * 2, tmp_path / "plain")
    assert numbers(ours) == numbers(theirs)


@pytest.mark.parametrize("config", [DPO, SUPERVISED, replace(DPO, objective=Bco())], ids=["dpo", "supervised", "bco"])
def test_resuming_repeats_the_run_bit_for_bit(config, make_policy, tokenizer, pairs, demonstrations, tmp_path):
    groups = demonstrations if config is SUPERVISED else pairs
    batches = [groups[:4], groups[4:], groups[2:6], groups[1:5], groups[:3], groups[3:]]
    config = replace(config, checkpoint_steps=3)
    straight, resumed = make_policy(0), make_policy(7)
    whole = run(config, straight, tokenizer, batches, tmp_path / "straight")
    saved = sorted((tmp_path / "straight").iterdir())
    assert [path.name for path in saved] == ["step-000003", "step-000006"]
    rest = run(config, resumed, tokenizer, batches, tmp_path / "resumed", total_steps=6, resume=saved[0])
    assert numbers(rest) == numbers(whole[3:])
    assert [(r.step, r.num_tokens) for r in rest] == [(r.step, r.num_tokens) for r in whole[3:]]
    assert_same_policy(resumed, straight, rtol=0, atol=0)
    for name in ("model/model.safetensors", "optimizer-00001-of-00001.safetensors"):
        assert (tmp_path / "resumed" / saved[1].name / name).read_bytes() == (saved[1] / name).read_bytes()


def test_a_run_that_stops_after_any_step_goes_on_as_if_it_had_not(make_policy, tokenizer, pairs, scored, tmp_path):
    straight = make_policy(0)
    batches = [scored(pairs[n : n + 4], straight) for n in range(4)]
    config = replace(DPO, objective=Bco(), checkpoint_steps=2)
    whole = numbers(run(config, straight, tokenizer, batches, tmp_path / "straight"))
    for step in range(1, 4):
        wishes = iter([False] * step + [True])
        folder = tmp_path / str(step)
        first = run(config, make_policy(0), tokenizer, batches, folder, stop=lambda wishes=wishes: next(wishes))
        assert [result.step for result in first] == list(range(1, step + 1))
        policy, saved = make_policy(7), folder / f"step-{step:06d}"
        rest = run(config, policy, tokenizer, batches, folder, total_steps=4, resume=saved, stop=lambda: False)
        assert numbers(first) + numbers(rest) == whole
        assert_same_policy(policy, straight, rtol=0, atol=0)


def test_a_run_that_stops_before_its_first_step_leaves_nothing(policy, tokenizer, pairs, tmp_path):
    assert run(DPO, policy, tokenizer, [pairs], tmp_path, stop=lambda: True) == []
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_serves_as_a_model_with_identical_logits(policy, tokenizer, pairs, tmp_path):
    run(DPO, policy, tokenizer, [pairs], tmp_path)
    model = tmp_path / "step-000001" / "model"
    served = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([pairs[3].prompt_ids])
    assert torch.equal(served(input_ids=ids).logits, policy(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(model).chat_template == tokenizer.chat_template


def test_tokens_are_counted_once_per_prompt(policy, tokenizer, pairs, tmp_path):
    expected = sum(len(g.prompt_ids) + sum(map(len, g.completion_ids)) for g in pairs)
    assert [r.num_tokens for r in run(DPO, policy, tokenizer, [pairs] * 2, tmp_path)] == [expected, 2 * expected]


def test_a_step_without_groups_is_counted_and_changes_nothing(make_policy, tokenizer, pairs, tmp_path):
    config, batches = replace(DPO, checkpoint_steps=2), [pairs[:4], [], pairs[4:], []]
    whole = run(config, make_policy(0), tokenizer, batches, tmp_path / "whole")
    assert [(result.step, bool(result.metrics)) for result in whole] == [(1, True), (2, False), (3, True), (4, False)]
    rates = [result.metrics["lr"] for result in run(DPO, make_policy(0), tokenizer, [pairs] * 4, tmp_path / "full")]
    assert [result.metrics["lr"] for result in whole[::2]] == rates[::2]
    saved = sorted((tmp_path / "whole").iterdir())
    assert [read_manifest(folder).metrics for folder in saved] == [result.metrics for result in whole[::2]]
    rest = run(config, make_policy(7), tokenizer, batches, tmp_path / "rest", total_steps=4, resume=saved[0])
    assert numbers(rest) == numbers(whole[2:])
    assert read_manifest(tmp_path / "rest" / "step-000004").files == read_manifest(saved[1]).files


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_list_of_more_or_fewer_batches_than_steps_is_refused(number, policy, tokenizer, pairs, tmp_path):
    with pytest.raises(
        ValueError, match=f"global_batches has {number} batches, but total_steps is 3; give one for each step"
    ):
        run(DPO, policy, tokenizer, [pairs] * number, tmp_path, total_steps=3)
    assert not list(tmp_path.iterdir())


def test_too_few_batches_of_a_function_are_refused(policy, tokenizer, pairs, tmp_path):
    with pytest.raises(ValueError, match="The data ended before step 2 of 3"):
        run(DPO, policy, tokenizer, lambda _: iter([pairs]), tmp_path, total_steps=3)


def test_a_batch_of_a_list_has_at_most_batch_size_groups(make_policy, tokenizer, pairs, tmp_path):
    config, expected = replace(DPO, batch_size=4), "The batch of step 2 has 8 groups, but batch_size is 4; give smaller"
    with pytest.raises(ValueError, match=expected):
        run(config, make_policy(), tokenizer, [pairs[:4], pairs], tmp_path)
    assert not list(tmp_path.iterdir())
    fewer = run(config, make_policy(), tokenizer, [pairs[:4], pairs[4:7]], tmp_path)
    streamed = run(config, make_policy(), tokenizer, lambda _: iter([pairs[:5]]), tmp_path, total_steps=1)
    assert [result.step for result in (*fewer, *streamed)] == [1, 2, 1]


def test_a_loss_that_is_no_number_is_shown_and_ends_the_run_without_checkpoint(policy, tokenizer, pairs, tmp_path):
    torch.nn.init.constant_(policy.model.norm.weight, math.inf)
    config = replace(DPO, checkpoint_steps=1)
    results = train(config, policy, tokenizer, [pairs], total_steps=1, checkpoint_dir=tmp_path)
    first = next(results)
    assert math.isnan(first.metrics["loss"])
    with pytest.raises(FloatingPointError, match=r"diverged at step 1 .*; no weight was changed yet, so look for"):
        next(results)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_after_an_update_is_blamed_on_the_learning_rate(policy, tokenizer, pairs, tmp_path):
    config = replace(DPO, checkpoint_steps=2)
    results = train(config, policy, tokenizer, [pairs] * 2, total_steps=2, checkpoint_dir=tmp_path)
    assert math.isfinite(next(results).metrics["loss"])
    torch.nn.init.constant_(policy.model.norm.weight, math.inf)
    with pytest.raises(FloatingPointError, match=r"diverged at step 2 \(loss nan, .*\); lower the learning rate"):
        list(results)


def test_a_gradient_that_is_no_number_moves_no_weight(make_policy, tokenizer, pairs, tmp_path):
    policy, before = make_policy(), make_policy()
    policy.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    results = train(
        replace(DPO, checkpoint_steps=1), policy, tokenizer, [pairs], total_steps=1, checkpoint_dir=tmp_path
    )
    first = next(results)
    assert math.isfinite(first.metrics["loss"])
    assert not math.isfinite(first.metrics["grad_norm"])
    with pytest.raises(FloatingPointError, match="diverged at step 1"):
        next(results)
    assert_same_policy(policy, before, rtol=0, atol=0)


def test_batches_are_those_of_the_run_or_a_function_of_the_step_before(make_policy, tokenizer, pairs, tmp_path):
    """A list is the same at each start. A function is called with the last step, and returns the batches after it."""
    batches, asked = [pairs[n : n + 4] for n in range(4)], []

    def after(step):
        asked.append(step)
        return iter(batches[step:])

    config = replace(DPO, checkpoint_steps=2)
    whole = run(config, make_policy(), tokenizer, batches, tmp_path)
    for given in (batches, after):
        folder = tmp_path / type(given).__name__
        rest = run(config, make_policy(7), tokenizer, given, folder, total_steps=4, resume=tmp_path / "step-000002")
        assert numbers(rest) == numbers(whole[2:])
    assert asked == [2]


def test_an_iterator_of_batches_cannot_be_resumed_and_is_refused(policy, tokenizer, pairs, tmp_path):
    with pytest.raises(TypeError, match="is a list_iterator; give a list with one batch for each step, or a function"):
        run(DPO, policy, tokenizer, iter([pairs]), tmp_path, total_steps=1)


def test_a_config_that_is_not_resolved_is_refused(policy, tokenizer, pairs, tmp_path):
    resolved = TrainConfig().resolved(len(pairs))
    for config in (
        TrainConfig(),
        replace(resolved, checkpoint_steps=None),
        replace(resolved, optim=Optim()),
        replace(resolved, batch_size=None),
        replace(resolved, n_epochs=None),
    ):
        steps = train(config, policy, tokenizer, [pairs], total_steps=1, checkpoint_dir=tmp_path)
        with pytest.raises(ValueError, match=r"config still has undecided options; pass config\.resolved"):
            next(steps)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.nn.Sequential])
def test_a_wrapper_of_a_policy_is_refused_by_name(wrap, policy, tokenizer, pairs, tmp_path):
    wrapped = wrap(policy)
    with pytest.raises(ValueError, match=f"{type(wrapped).__name__}, which is not a transformers model; pass"):
        run(DPO, wrapped, tokenizer, [pairs], tmp_path)


def test_folders_may_be_texts(make_policy, tokenizer, pairs, tmp_path):
    config = replace(DPO, checkpoint_steps=1)
    run(config, make_policy(), tokenizer, [pairs] * 2, str(tmp_path))
    rest = run(config, make_policy(), tokenizer, [pairs] * 2, str(tmp_path), resume=str(tmp_path / "step-000001"))
    assert [result.step for result in rest] == [2]


def test_a_group_longer_than_max_length_is_refused_in_training_and_in_validation(policy, tokenizer, pairs, tmp_path):
    short = [pair for pair in pairs if len(pair.prompt_ids) + max(map(len, pair.completion_ids)) <= 16]
    (long, *_) = [pair for pair in pairs if pair not in short]
    config, expected = replace(DPO, max_length=16, checkpoint_steps=1), f"Line {long.line} has .* max_length is 16"
    assert short
    with pytest.raises(ValueError, match=expected):
        run(config, policy, tokenizer, [[*short, long]], tmp_path)
    with pytest.raises(ValueError, match=expected):
        run(config, policy, tokenizer, [short], tmp_path, validation=lambda: [[long]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ends", ["finished", "closed", "failed"])
def test_a_trained_policy_can_be_trained_by_its_owner(dtype, ends, make_policy, tokenizer, pairs, tmp_path):
    policy = make_policy().to(dtype)
    own = policy.model.layers[1].forward  # a patch of somebody else's
    policy.model.layers[1].forward = lambda *args, **kwargs: own(*args, **kwargs)
    patch = policy.model.layers[1].forward
    config = replace(DPO, activation_checkpointing="on", max_tokens_per_pack=64)
    batches = [pairs, pairs[:1] if ends != "failed" else [replace(pairs[0], ref_logps=None)]]
    steps = train(
        replace(config, checkpoint_steps=2), policy, tokenizer, batches, total_steps=2, checkpoint_dir=tmp_path
    )
    next(steps)
    if ends == "closed":
        steps.close()
    elif ends == "failed":
        with pytest.raises(ValueError, match="no ref_logps"):
            next(steps)
    else:
        list(steps)
    assert "forward" not in vars(policy.model.layers[0])
    assert policy.model.layers[1].forward is patch
    assert all(parameter.grad is None for parameter in policy.parameters())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    policy.train()
    policy(input_ids=ids, labels=ids).loss.backward()
    assert {parameter.grad.dtype for parameter in policy.parameters()} == {dtype}
    optimizer.step()


def test_chosen_completions_that_fall_while_margins_grow_get_one_warning(policy, tokenizer, pairs, tmp_path, caplog):
    likelier = [replace(pair, ref_logps=(pair.ref_logps[0] + 50, pair.ref_logps[1] + 100)) for pair in pairs]
    slow = replace(DPO, optim=Optim(learning_rate=1e-6))
    results = run(slow, policy, tokenizer, [likelier] * 12, tmp_path)
    assert [result.step for result in results if result.warning] == [10]
    assert results[9].warning in caplog.text
