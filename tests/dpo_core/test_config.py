"""Tests the defaults that depend on the objective, the adapter and the data, and the limits of a run's options."""

import math

import pytest

from dpo_core.config import EarlyStop, Lora, Optim, TrainConfig
from dpo_core.options import Dpo, InvalidOption, Orpo, RewardBradleyTerry, Supervised


@pytest.mark.parametrize(
    ("objective", "epochs", "rate", "rate_of_an_adapter"),
    [
        (Dpo(), 1, 1e-6, 1e-5),
        (Orpo(), 1, 8e-6, 8e-5),
        (Supervised(), 3, 2e-5, 2e-4),
        (RewardBradleyTerry(), 1, 1e-5, 1e-4),
    ],
)
def test_epochs_and_rate_are_the_objectives_and_an_adapter_learns_ten_times_as_fast(
    objective, epochs, rate, rate_of_an_adapter
):
    config = TrainConfig(objective=objective)
    for with_adapter, expected in ((False, rate), (True, rate_of_an_adapter)):
        settled = config.settled(with_adapter=with_adapter)
        assert (settled.n_epochs, settled.optim.learning_rate) == (epochs, expected)


def test_a_multiplier_multiplies_the_default_rate_and_is_then_used_up():
    optim = TrainConfig(optim=Optim(learning_rate_multiplier=3.0)).settled(with_adapter=True).optim
    assert (optim.learning_rate, optim.learning_rate_multiplier) == (pytest.approx(3e-5), None)


def test_what_the_user_chose_stays():
    config = TrainConfig(optim=Optim(learning_rate=0.5), n_epochs=7, batch_size=9, checkpoint_steps=11)
    assert config.resolved(100, with_adapter=True) == config


# 8 groups for small data, a fiftieth of them in between, 64 for large data, and never more than there are.
@pytest.mark.parametrize(
    ("num_groups", "batch_size", "checkpoint_steps"),
    [(3, 3, 1), (100, 8, 4), (1000, 20, 13), (4000, 64, 16), (10**6, 64, 3907)],
)
def test_batches_and_checkpoints_depend_on_the_number_of_groups(num_groups, batch_size, checkpoint_steps):
    config = TrainConfig().resolved(num_groups)
    assert (config.batch_size, config.checkpoint_steps) == (batch_size, checkpoint_steps)
    steps = math.ceil(num_groups / batch_size)
    assert steps <= 4 * checkpoint_steps < steps + 4


def test_a_batch_is_never_larger_than_the_data():
    assert TrainConfig(batch_size=200).resolved(150).batch_size == 150


@pytest.mark.parametrize(
    ("make", "field", "sentence"),
    [
        (lambda: Optim(learning_rate=0), "learning_rate", "is 0; it must be greater than 0 and at most 1."),
        (lambda: Optim(learning_rate=1.5), "learning_rate", "is 1.5; it must be greater than 0 and at most 1."),
        (lambda: Optim(warmup_ratio=1.0), "warmup_ratio", "is 1.0; it must be from 0 to less than 1."),
        (lambda: Optim(weight_decay=-0.1), "weight_decay", "is -0.1; it must be from 0 to 1."),
        (lambda: Optim(max_grad_norm=0), "max_grad_norm", "is 0; it must be greater than 0."),
        (
            lambda: Optim(learning_rate=1, learning_rate_multiplier=1),
            "learning_rate_multiplier",
            "cannot both be given",
        ),
        (lambda: Lora(r=0), "r", "is 0; it must be from 1 to 1024."),
        (lambda: Lora(dropout=1), "dropout", "is 1; it must be from 0 to less than 1."),
        (lambda: Lora(target_modules=()), "target_modules", "a list of names of modules"),
        (lambda: EarlyStop(patience=0), "patience", "is 0; it must be at least 1."),
        (lambda: EarlyStop(patience=1, min_gain=math.nan), "min_gain", "is nan; it must be 0 or more and finite."),
        (lambda: TrainConfig(n_epochs=51), "n_epochs", "is 51; it must be from 1 to 50."),
        (lambda: TrainConfig(batch_size=257), "batch_size", "is 257; it must be from 1 to 256."),
        (lambda: TrainConfig(checkpoint_steps=0), "checkpoint_steps", "is 0; it must be at least 1."),
        (lambda: TrainConfig(max_length=1), "max_length", "is 1; it must be from 2 to 1048576."),
        (
            lambda: TrainConfig(max_length=64, max_tokens_per_pack=63),
            "max_tokens_per_pack",
            "is 63; it must be at least max_length, which is 64.",
        ),
        (lambda: TrainConfig(seed=2**31), "seed", "is 2147483648; it must be from 0 to 2147483647."),
        (
            lambda: TrainConfig(optim=Optim(learning_rate_multiplier=100_001)),
            "learning_rate_multiplier",
            "is 100001; it must be at most 100000.",
        ),
    ],
)
def test_a_value_beyond_its_limit_is_refused_by_name(make, field, sentence):
    with pytest.raises(InvalidOption) as refused:
        make()
    assert refused.value.field == field
    assert sentence in str(refused.value)


def test_the_ends_of_ranges_are_in_them():
    Optim(learning_rate=1, warmup_ratio=0, weight_decay=1)
    Lora(r=1024, dropout=0)
    TrainConfig(n_epochs=50, batch_size=256, checkpoint_steps=1, max_length=2, max_tokens_per_pack=2, seed=2**31 - 1)
    TrainConfig(max_length=1_048_576, optim=Optim(learning_rate_multiplier=100_000))
