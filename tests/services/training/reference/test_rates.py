"""Tests whether vLLM or the trainer is chosen to score, by speeds that earlier jobs measured."""

from pathlib import Path

import pytest

from services.training.reference import rates
from services.training.reference.rates import Rate

TRAINER = Rate(tokens_per_second=100)


@pytest.mark.parametrize(
    ("engine", "num_tokens", "pays"),
    [
        (None, 5_900, False),
        (None, 6_100, True),
        (Rate(tokens_per_second=1000, loading_seconds=90), 9_900, False),
        (Rate(tokens_per_second=1000, loading_seconds=90), 10_100, True),
        (Rate(tokens_per_second=1000), 1, True),
    ],
)
def test_an_engine_pays_if_it_ends_sooner_with_its_loading(engine: Rate | None, num_tokens: int, pays: bool) -> None:
    assert rates.pays(TRAINER, engine, num_tokens) == pays


def test_the_user_reads_both_times() -> None:
    engine = Rate(tokens_per_second=1000, loading_seconds=90)
    assert rates.in_words(TRAINER, engine, 5000) == (
        "they need about 50 s for 5000 tokens, and vLLM would need 95 s, of which 90 s for loading the model"
    )
    assert rates.in_words(TRAINER, None, 5000).endswith("loading vLLM pays only if they need more than 60 s")


def test_a_speed_is_read_as_it_was_written_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    uri = f"{tmp_path.as_uri()}/rate.json"
    assert rates.read(uri) is None
    rates.write(uri, TRAINER)
    assert rates.read(uri) == TRAINER
    (tmp_path / "rate.json").write_text("{")
    assert rates.read(uri) is None
