"""Tests how `train` evaluates held-out groups."""

import math
import threading
from dataclasses import replace

import pytest
import torch

from dpo_core.checkpoint_selection import stalls
from dpo_core.config import EarlyStop, Optim, TrainConfig
from dpo_core.encoding.encode import EncodedGroup, Outline
from dpo_core.models.model import load_policy
from dpo_core.options import Aot, Bco, Dpo, Kto, Lipo, Mpo, Supervised
from dpo_core.training.checkpoint import read_manifest
from dpo_core.training.trainer import train

CONFIG = TrainConfig(
    objective=Dpo(beta=0.5),
    optim=Optim(learning_rate=1e-2),
    batch_size=8,
    n_epochs=1,
    max_length=64,
    checkpoint_steps=2,
)
SUPERVISED = replace(CONFIG, objective=Supervised())


def run(config, policy, tokenizer, batches, folder, **kwargs):
    return list(train(config, policy, tokenizer, batches, total_steps=len(batches), checkpoint_dir=folder, **kwargs))


def evaluated(result) -> dict[str, float]:
    return {key.removeprefix("eval/"): value for key, value in result.metrics.items() if key.startswith("eval/")}


@pytest.mark.parametrize("config", [CONFIG, SUPERVISED], ids=["dpo", "supervised"])
def test_every_checkpoint_is_evaluated_as_if_it_began_to_train_on_all_of_them(
    config, policy, tokenizer, pairs, demonstrations, tmp_path
):
    groups = pairs if config is CONFIG else demonstrations
    batches, held_out = [groups[:2], groups[2:4], groups[:3], groups[1:4], groups[:1]], groups[3:]
    results = run(config, policy, tokenizer, batches, tmp_path, validation=lambda: [held_out[:1], held_out[1:]])
    assert [result.step for result in results if evaluated(result)] == [2, 4, 5]
    for step in (2, 4, 5):
        found, checkpoint = evaluated(results[step - 1]), tmp_path / f"step-{step:06d}"
        begun = run(config, load_policy(checkpoint / "model"), tokenizer, [held_out], tmp_path / "again")[0].metrics
        assert {"loss", "mean_token_accuracy" if config is SUPERVISED else "rewards/margins"} <= found.keys()
        assert found == pytest.approx({key: begun[key] for key in found}, rel=1e-5, abs=1e-6)
        assert read_manifest(checkpoint).metrics == results[step - 1].metrics


def with_completions_of_other_prompts(pairs: list[EncodedGroup], scored, reference) -> list[EncodedGroup]:
    groups = [
        EncodedGroup(pair.prompt_ids, (*pair.completion_ids, other.completion_ids[0]), None, pair.line)
        for pair, other in zip(pairs, [pairs[-1], *pairs], strict=False)
    ]
    return [replace(group, ratings=(1.0, 0.0, math.nan)) for group in scored(groups, reference)]


OBJECTIVES = [Dpo(), Supervised(), Lipo(), Kto(), Bco(), Aot(), Aot(paired=False), Mpo()]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.type)
def test_held_out_groups_are_one_batch_however_they_are_cut(
    objective, make_policy, make_groups, tokenizer, pairs, demonstrations, scored, tmp_path
):
    groups = {
        "supervised": demonstrations,
        "lipo": scored([*make_groups(4, 3), *make_groups(4, 4, seed=1)], make_policy(1)),
        "kto": with_completions_of_other_prompts(pairs, scored, make_policy(1)),
    }.get(objective.type, pairs)
    groups = [replace(group, weight=0.5 + place / 4) for place, group in enumerate(groups)]

    def evaluate(held_out: list[list[EncodedGroup]], tokens: int) -> dict[str, float]:
        config = replace(CONFIG, objective=objective, max_tokens_per_pack=tokens)
        results = run(config, make_policy(), tokenizer, [groups[:4]], tmp_path, validation=lambda: held_out)
        return evaluated(results[0])

    at_once = evaluate([groups], 8192)
    for held_out in ([groups[:5], groups[5:6], groups[6:]], [[group] for group in groups]):
        assert evaluate(held_out, 64) == pytest.approx(at_once, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("config", [CONFIG, SUPERVISED, replace(CONFIG, objective=Bco())], ids=["dpo", "sft", "bco"])
def test_validation_does_not_change_training_by_a_bit(config, make_policy, tokenizer, pairs, demonstrations, tmp_path):
    groups = demonstrations if config is SUPERVISED else pairs
    watched, alone = make_policy(), make_policy()
    batches, clocks = [groups[:3], groups[3:6], groups[1:5], groups[:4]], {"tokens_per_second", "hfu"}
    ours, theirs = (
        run(config, policy, tokenizer, batches, tmp_path / name, validation=validation)
        for policy, name, validation in ((watched, "watched", lambda: [groups[6:]]), (alone, "alone", None))
    )
    for result, plain in zip(ours, theirs, strict=True):
        assert [result.metrics[key] for key in plain.metrics.keys() - clocks] == [
            plain.metrics[key] for key in plain.metrics.keys() - clocks
        ]
    torch.testing.assert_close(dict(watched.named_parameters()), dict(alone.named_parameters()), rtol=0, atol=0)
    manifests = [read_manifest(tmp_path / name / "step-000004") for name in ("watched", "alone")]
    assert manifests[0].statistics == manifests[1].statistics
    assert manifests[0].files == manifests[1].files
    assert manifests[0].num_tokens == manifests[1].num_tokens


def test_held_out_groups_are_read_again_for_every_checkpoint(policy, tokenizer, pairs, tmp_path):
    read = []

    def validation():
        read.append(len(read))
        yield pairs[4:6]
        yield pairs[6:]

    results = run(CONFIG, policy, tokenizer, [pairs[:4]] * 4, tmp_path, validation=validation)
    assert read == [0, 1]
    assert [bool(evaluated(result)) for result in results] == [False, True, False, True]


def test_nothing_is_evaluated_if_validation_returns_none(policy, tokenizer, pairs, tmp_path):
    (result,) = run(CONFIG, policy, tokenizer, [pairs], tmp_path, validation=lambda: None)
    assert not evaluated(result)


def test_validation_without_groups_is_refused(policy, tokenizer, pairs, tmp_path):
    with pytest.raises(ValueError, match="The validation data have no rows to evaluate on; add some"):
        run(CONFIG, policy, tokenizer, [pairs], tmp_path, validation=list)


def test_held_out_groups_that_the_objective_cannot_read_are_refused_by_line(
    policy, tokenizer, pairs, demonstrations, tmp_path
):
    with pytest.raises(ValueError, match="Line 3 has 1 completions; the method 'dpo' needs at least 2"):
        run(CONFIG, policy, tokenizer, [pairs], tmp_path, validation=lambda: [demonstrations[2:]])


def test_an_evaluation_that_is_not_finite_ends_the_run_without_its_checkpoint(policy, tokenizer, pairs, tmp_path):
    def break_it():
        torch.nn.init.constant_(policy.lm_head.weight, math.nan)
        return [pairs]

    with pytest.raises(FloatingPointError, match=r"diverged at step 1 \(eval/loss nan\)"):
        run(CONFIG, policy, tokenizer, [pairs], tmp_path, validation=break_it)
    assert not list(tmp_path.iterdir())


def test_a_step_that_diverged_is_not_evaluated(policy, tokenizer, pairs, tmp_path):
    torch.nn.init.constant_(policy.lm_head.weight, math.nan)
    with pytest.raises(FloatingPointError, match=r"\(loss nan, grad_norm nan\)"):
        run(CONFIG, policy, tokenizer, [pairs], tmp_path, validation=pytest.fail)


EARLY = replace(CONFIG, early_stop=EarlyStop(patience=2))
RATES = replace(CONFIG.optim, learning_rate=0.3, schedule="constant")  # so high that held-out losses rise


def test_a_run_ends_when_its_evaluations_bring_no_gain(make_policy, tokenizer, pairs, tmp_path):
    held_out, batches = pairs[4:], [pairs[:4]] * 20
    config = replace(EARLY, optim=RATES)
    results = run(config, make_policy(), tokenizer, batches, tmp_path, validation=lambda: [held_out])
    last = results[-1]
    losses = [result.metrics["eval/loss"] for result in results if evaluated(result)]
    assert [each.value for each in last.evaluations] == losses
    assert last.step == 2 * len(losses) < 20
    assert min(losses[-2:]) >= min(losses[:-2]), "the last two brought no gain"
    assert not any(stalls(last.evaluations[:n], "eval/loss", config.early_stop) for n in range(len(losses)))
    assert read_manifest(tmp_path / f"step-{last.step:06d}").evaluations == last.evaluations


def test_a_resumed_run_ends_at_the_same_step_with_the_same_bits(make_policy, tokenizer, pairs, tmp_path):
    """The run is resumed from each checkpoint, from a pause between two, and from the last, after which nothing is left
    to do."""
    config, batches = replace(EARLY, optim=RATES), [pairs[:4], pairs[2:6], pairs[1:4], pairs[3:]] * 5

    def go_on(policy, folder, **kwargs):
        return run(config, policy, tokenizer, batches, folder, validation=lambda: [pairs[4:]], **kwargs)

    straight = make_policy()
    whole = go_on(straight, tmp_path)
    wishes = iter([False] * 3 + [True])
    paused = go_on(make_policy(), tmp_path / "paused", stop=lambda: next(wishes))
    assert [result.step for result in paused] == [1, 2, 3]
    starts = [*sorted(tmp_path.glob("step-*")), tmp_path / "paused" / "step-000003"]
    assert len(starts) >= 4
    for start in starts:
        policy, begun = make_policy(7), read_manifest(start).step
        rest = go_on(policy, tmp_path / "rest" / start.name, resume=start)
        assert [result.evaluations for result in rest] == [result.evaluations for result in whole[begun:]]
        assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), straight.parameters(), strict=True))


def test_an_evaluation_is_not_told_again_by_a_resumed_step_without_groups(make_policy, tokenizer, pairs, tmp_path):
    batches, wishes = [pairs[:4], pairs[4:], [], pairs[:4]], iter([False, True])
    run(CONFIG, make_policy(), tokenizer, batches, tmp_path, validation=lambda: [pairs])
    given = {"validation": lambda: [pairs], "resume": tmp_path / "step-000002", "stop": lambda: next(wishes)}
    run(CONFIG, make_policy(), tokenizer, batches, tmp_path / "again", **given)
    assert "eval/loss" in read_manifest(tmp_path / "step-000002").metrics
    assert "eval/loss" not in read_manifest(tmp_path / "again" / "step-000003").metrics


def test_resuming_with_another_early_stop_is_refused(policy, tokenizer, pairs, tmp_path):
    run(CONFIG, policy, tokenizer, [pairs[:4]] * 2, tmp_path)
    with pytest.raises(ValueError, match="was trained with early_stop None, but this run has"):
        run(EARLY, policy, tokenizer, [pairs[:4]] * 2, tmp_path, resume=tmp_path / "step-000002")


def test_no_thread_reads_on_after_an_evaluation_has_failed(policy, tokenizer, pairs, tmp_path):
    held_out = [[Outline.of(pairs[0])], [Outline.of(replace(pairs[1], ref_logps=None))]]

    def load(outlines):
        groups = [pairs[outline.line - 1] for outline in outlines]
        return [
            outline.with_ids(each.prompt_ids, each.completion_ids)
            for outline, each in zip(outlines, groups, strict=True)
        ]

    with pytest.raises(ValueError, match="reference") as failed:
        run(CONFIG, policy, tokenizer, [pairs], tmp_path, validation=lambda: held_out, load_ids=load)
    assert failed  # its traceback holds whatever was not closed
    for thread in threading.enumerate():
        if thread.name in ("read-ahead", "load-ahead"):
            thread.join(60)
            assert not thread.is_alive()
