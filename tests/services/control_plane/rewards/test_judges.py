"""Tests which models score completions, and with which beta, by the rows of jobs in a real database."""

import asyncio
from pathlib import Path

import psycopg
import pytest

from dpo_core.options import Dpo, Ipo, Mpo, Objective, RewardBradleyTerry, Simpo, Supervised
from services.control_plane.core.errors import ApiError
from services.control_plane.core.store import Store, migrate
from services.control_plane.core.tables import DEFAULT_PROJECT
from services.control_plane.rewards.judges import Judge, judge_of
from services.control_plane.settings import BaseModel, Settings
from tests.services.control_plane.rewards.conftest import add

TRAINED: dict[str, tuple[Objective, str, Path]] = {
    "dpo": (Dpo(beta=0.3), "tiny", Path("/tiny")),
    "next": (Ipo(beta=0.7), "ft:tiny:raydpo::dpo", Path("/dpo")),
    "mix": (Mpo(objectives=(Supervised(), Dpo(beta=0.4)), weights=(1.0, 1.0)), "tiny", Path("/tiny")),
    "simpo": (Simpo(), "tiny", Path("/tiny")),
    "reward": (RewardBradleyTerry(), "tiny", Path("/tiny")),
}


@pytest.fixture(scope="module")
def settings(offline: Settings) -> Settings:
    migrate(offline.database_url)
    with psycopg.connect(offline.database_url, autocommit=True) as rows:
        for name, (objective, start, source) in TRAINED.items():
            add(rows, name, Path(f"/{name}"), objective, start, source)
    bases = {"tiny": BaseModel(source="/tiny"), "other": BaseModel(source="/other")}
    return offline.model_copy(update={"models": bases})


def find(settings: Settings, name: str, *, reference: str | None = None, beta: float | None = None) -> Judge:
    async def run() -> Judge:
        store = Store(settings.database_url)
        try:
            async with store.begin_for(DEFAULT_PROJECT) as session:
                return await judge_of(session, settings, full(name), reference=reference, beta=beta)
        finally:
            await store.close()

    return asyncio.run(run())


def full(name: str) -> str:
    return f"ft:tiny:raydpo::{name}" if name in TRAINED else name


@pytest.mark.parametrize(
    ("name", "reference", "beta"),
    [("dpo", "tiny", 0.3), ("next", "ft:tiny:raydpo::dpo", 0.7), ("mix", "tiny", 0.4)],
)
def test_a_policy_is_compared_as_its_job_did(settings: Settings, name: str, reference: str, beta: float) -> None:
    judge = find(settings, name)
    assert judge.reference is not None
    assert (judge.model.id, judge.reference.id, judge.beta) == (full(name), reference, beta)
    assert judge.today is not None


def test_the_request_overrides_the_job(settings: Settings) -> None:
    judge = find(settings, "dpo", reference="other", beta=2.0)
    assert judge.reference is not None
    assert (judge.reference.id, judge.beta) == ("other", 2.0)
    assert find(settings, "other", reference="tiny", beta=1.0).today is None  # no job trained a base model


def test_a_reward_model_has_neither_reference_nor_beta(settings: Settings) -> None:
    judge = find(settings, "reward")
    assert (judge.model.num_outputs, judge.reference, judge.beta) == (1, None, None)


@pytest.mark.parametrize(
    ("name", "reference", "beta", "param", "message"),
    [
        ("tiny", None, None, "beta", "'tiny' is a base model, which has no beta"),
        ("tiny", None, 1.0, "reference", "'tiny' is a base model, which has no reference"),
        (
            "simpo",
            None,
            None,
            "beta",
            "was trained by simpo, whose rewards are no log-ratios",
        ),
        ("reward", None, 1.0, "beta", "takes no beta"),
        ("reward", "tiny", None, "reference", "takes no reference"),
        ("dpo", "ft:tiny:raydpo::reward", None, "reference", "set the field 'reference' to a policy or a base model"),
        ("dpo", "none", None, "reference", "'none' does not exist"),
    ],
)
def test_what_neither_the_request_nor_the_job_gives_is_refused_by_name(
    settings: Settings, name: str, reference: str | None, beta: float | None, param: str, message: str
) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        find(settings, name, reference=reference, beta=beta)
    assert refused.value.param == param


def test_a_deleted_reference_must_be_replaced(settings: Settings) -> None:
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        rows.execute("UPDATE jobs SET spec = replace(spec::text, '::dpo', '::gone')::jsonb WHERE id = 'ftjob-next'")
    with pytest.raises(ApiError, match="was deleted, or is not shared with this project; name another") as refused:
        find(settings, "next")
    assert refused.value.param == "reference"
    assert find(settings, "next", reference="tiny").beta == 0.7
