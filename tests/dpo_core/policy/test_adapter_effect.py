"""Tests how the effect of an adapter on its training rows is measured, and when the numbers of another program differ
from it too much."""

import json

import pytest
import torch
from torch import nn

from dpo_core.config import Lora
from dpo_core.models.adapter_folder import EFFECT
from dpo_core.models.model import adapter_off, load_policy
from dpo_core.policy.adapter_effect import NUM_ROWS, SIDE_TOKENS, Effect, Row, measure_effect, read_effect
from dpo_core.policy.scorer import Scorer

CHANGES = (3.0, -2.0, 0.5)
BASE = (-40.0, -30.0, -20.0)
EFFECT_OF_THREE = Effect([Row([1], [2], base + change, base) for base, change in zip(BASE, CHANGES, strict=True)])


@pytest.fixture
def adapted(policy, tmp_path):
    policy.save_pretrained(tmp_path / "base")
    adapted = load_policy(tmp_path / "base", adapter=Lora(r=4))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return adapted


def test_the_effect_is_that_of_the_models_own_forward(adapted, make_groups, plain_token_logps, tmp_path):
    effect = measure_effect(Scorer(adapted), make_groups(5, 3), max_tokens_per_pack=60)
    (tmp_path / EFFECT).write_bytes(effect.to_json())
    assert read_effect(tmp_path) == effect
    assert read_effect(tmp_path / "base") is None
    groups = [group for group in make_groups(5, 3) for _ in group.completion_ids]
    sizes = sorted(len(group.prompt_ids) + len(ids) for group in make_groups(5, 3) for ids in group.completion_ids)
    assert [len(row.prompt_ids) + len(row.completion_ids) for row in effect.rows] == sizes[:NUM_ROWS]
    for row in effect.rows:
        group = next(group for group in groups if list(group.prompt_ids) == row.prompt_ids)
        place = list(map(list, group.completion_ids)).index(row.completion_ids)
        with torch.no_grad():
            assert row.policy == pytest.approx(plain_token_logps(adapted, group)[place].sum().item(), abs=1e-3)
            with adapter_off(adapted):
                assert row.base == pytest.approx(plain_token_logps(adapted, group)[place].sum().item(), abs=1e-3)
    assert effect.largest == max(abs(row.policy - row.base) for row in effect.rows) > 0.1
    assert {name for name, weight in adapted.named_parameters() if weight.requires_grad} == {
        name for name, _ in adapted.named_parameters() if "lora_" in name
    }


def test_a_long_row_is_shortened_at_its_ends(adapted, make_groups):
    (group,) = make_groups(1, 1)
    long = type(group)(list(range(5, 305)), (list(range(10, 210)),), None, 1)
    (row,) = measure_effect(Scorer(adapted), [long], max_tokens_per_pack=60).rows
    assert row.prompt_ids == list(range(305 - SIDE_TOKENS, 305))
    assert row.completion_ids == list(range(10, 10 + SIDE_TOKENS))


def test_a_program_that_computes_as_training_did_has_no_fault():
    policy = [base + change for base, change in zip(BASE, CHANGES, strict=True)]
    assert EFFECT_OF_THREE.fault(policy, BASE) is None
    off = (0.1, -0.1, 0.05)  # as by another precision
    noisy = [[number + by for number, by in zip(side, off, strict=True)] for side in (policy, BASE)]
    assert EFFECT_OF_THREE.fault(*noisy) is None


@pytest.mark.parametrize(
    ("policy", "change", "of"),
    [(BASE, "0", "3"), ([-40.0, -35.0, -20.5], "0", "3"), ([-31.0, -32.0, -19.5], "9", "3")],
    ids=["it changes nothing", "it is another adapter", "it is too strong"],
)
def test_a_program_that_ignores_the_adapter_or_takes_another_is_told_with_both_numbers(policy, change, of):
    assert EFFECT_OF_THREE.fault(policy, BASE) == (
        f"it changes the log-probability of one of its training rows by {change} nats here, but by {of} in training; "
        "at most 1.5 may be between them"
    )


def test_an_effect_below_the_noise_is_not_judged():
    noisy = [base + 0.2 for base in BASE]  # 16 times of which is more than the effect
    assert EFFECT_OF_THREE.fault(noisy, noisy) is None
    tiny = Effect([Row([1], [2], -40.0005, -40.0)])
    assert tiny.fault([-40.0], [-40.0]) is None
    assert Effect([Row([1], [2], float("nan"), -40.0)]).fault([-40.0], [-40.0]) is None


def test_a_log_probability_that_is_not_finite_is_a_fault():
    policy = [BASE[0] + CHANGES[0], BASE[1] + CHANGES[1], float("nan")]
    assert "is not a finite number" in EFFECT_OF_THREE.fault(policy, BASE)


def test_a_file_of_a_later_release_is_read_and_a_damaged_one_is_refused_by_its_name(tmp_path):
    told = json.loads(EFFECT_OF_THREE.to_json())
    later = {"rows": [row | {"weight": 1.0} for row in told["rows"]], "release": 2}
    (tmp_path / EFFECT).write_text(json.dumps(later))
    assert read_effect(tmp_path) == EFFECT_OF_THREE
    for damaged in ("{", "[]", json.dumps({"rows": [{"base": 1.0}]})):
        (tmp_path / EFFECT).write_text(damaged)
        with pytest.raises(ValueError, match=f"{EFFECT} is damaged"):
            read_effect(tmp_path)
