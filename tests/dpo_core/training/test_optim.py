import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from dpo_core.config import Optim
from dpo_core.training.optim import learning_rate, make_optimizer


def rates(total_steps: int = 20, **options: object) -> list[float]:
    optim = Optim(learning_rate=1.0, **options)
    return [learning_rate(optim, step, total_steps) for step in range(1, total_steps + 1)]


@pytest.mark.parametrize(
    ("schedule", "theirs"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_without_warmup_schedules_are_those_of_transformers(schedule, theirs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = theirs(optimizer, num_warmup_steps=0, num_training_steps=20)
    expected = []
    for _ in range(20):
        expected += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates(schedule=schedule, warmup_ratio=0.0) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total_steps", [1, 2, 7, 20])
def test_the_rate_rises_to_its_peak_and_is_never_zero(schedule, total_steps):
    found = rates(total_steps, schedule=schedule, warmup_ratio=0.3)
    peak = found.index(max(found))
    assert all(0 < rate <= 1 for rate in found)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_warmup_takes_its_share_of_the_steps():
    assert rates(warmup_ratio=0.2, schedule="constant")[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_norms_and_biases_do_not_decay(policy):
    decayed, kept = make_optimizer(policy.parameters(), Optim(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0
    assert {id(p) for p in kept["params"]} == {id(p) for n, p in policy.named_parameters() if "norm" in n}
