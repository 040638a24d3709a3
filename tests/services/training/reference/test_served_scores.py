from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.model import load_policy
from dpo_core.policy.scorer import reference_token_logps, score_reference
from services.contract import Message, Progress, Report, Score
from services.training.data import dataset
from services.training.data.dataset import Dataset, write_part
from services.training.reference import served_scores
from services.training.reference.served_scores import by_deployment, score, served_token_logps


def build_group(number: int) -> EncodedGroup:
    others = (((1, 2),), ()) if number % 3 == 0 else None
    completions = ([5, 6 + number % 9, 8], [7 + number % 11])
    return EncodedGroup([1 + number % 5, 3, 4], completions, None, number, others=others)


@pytest.fixture
def encoded(tmp_path: Path) -> Dataset:
    uri = str(tmp_path / "encoded")
    ranges = [range(30), range(30, 37)]
    parts = [write_part(uri, f"{i}.parquet", [build_group(n) for n in numbers]) for i, numbers in enumerate(ranges)]
    return Dataset(uri=uri, parts=tuple(parts))


def groups_of(
    prompt_ids: list[list[int]], completion_ids: list[list[int]], others: list[Any] = ()
) -> list[EncodedGroup]:
    rows = zip(prompt_ids, completion_ids, others or [()] * len(prompt_ids), strict=True)
    return [EncodedGroup(prompt, (completion,), None, 0, others=(spans,)) for prompt, completion, spans in rows]


class Reference:
    """A stand-in for the reference's deployment, which answers from a thread. The first `deaths` calls find a dead
    replica."""

    def __init__(self, model_source: str, deaths: int = 0) -> None:
        self.model = load_policy(model_source)
        self.pool = ThreadPoolExecutor(1)
        self.deaths = deaths
        self.calls: list[Future[list[Score]]] = []
        self.connections = self.most_in_flight = 0
        self.calls_left = 10**6  # beyond them every replica is dead

    def connect(self) -> served_scores.Reference:
        self.connections += 1
        return served_scores.Reference(self.ask, self.ask_tokens)

    def ask_tokens(self, **rows: Any) -> Future[list[list[float]]]:
        return self.pool.submit(self._token_logps, **rows)

    def ask(self, **rows: Any) -> Future[list[Score]]:
        self.calls.append(self.pool.submit(self._score, **rows))
        self.most_in_flight = max(self.most_in_flight, sum(not call.done() for call in self.calls))
        return self.calls[-1]

    def _token_logps(self, **rows: Any) -> list[list[float]]:
        groups = groups_of(**rows)
        return [logps for (logps,) in reference_token_logps(self.model, groups, max_tokens_per_pack=1000)]

    def _score(self, **rows: Any) -> list[Score]:
        self.calls_left -= 1
        if self.deaths or self.calls_left < 0:
            self.deaths = max(0, self.deaths - 1)
            raise RayActorError
        scored = score_reference(self.model, groups_of(**rows), max_tokens_per_pack=1000)
        return [Score(sum(group.ref_logps), *group.num_learned) for group in scored]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_scores, "PAUSES_SECONDS", (0.0, 0.0, 0.0, 0.0))


UNSCORED = {"ref_logps": None, "ref_head_logps": None}


@pytest.fixture
def expected(model_source: str, encoded: Dataset) -> list[EncodedGroup]:
    groups = list(dataset.read_groups(encoded))
    return score_reference(load_policy(model_source), groups, max_tokens_per_pack=1000)


def scored(encoded: Dataset, reference: Reference, reports: list[Report]) -> list[EncodedGroup]:
    made = score(encoded, f"{encoded.uri}-scored", by_deployment(reference.connect, reports.append), reports.append)
    assert [(part.name, part.num_groups, part.num_tokens) for part in made.parts] == [
        (part.name, part.num_groups, part.num_tokens) for part in encoded.parts
    ]
    return list(dataset.read_groups(made))


def assert_same(groups: list[EncodedGroup], expected: list[EncodedGroup]) -> None:
    assert [replace(group, **UNSCORED) for group in groups] == [replace(g, **UNSCORED) for g in expected]
    for group, other in zip(groups, expected, strict=True):
        assert group.ref_logps == pytest.approx(other.ref_logps, abs=1e-4)


def test_every_group_gets_its_own_logps_with_many_calls_in_flight(
    model_source: str, encoded: Dataset, expected: list[EncodedGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_scores, "GROUPS_PER_CALL", 2)
    monkeypatch.setattr(served_scores, "CALLS_IN_FLIGHT", 5)
    reference, reports = Reference(model_source), list[Any]()
    assert_same(scored(encoded, reference, reports), expected)
    assert len(reference.calls) == 19
    assert 1 < reference.most_in_flight <= 5
    assert all(isinstance(report, Progress) and report.stage == "scoring" for report in reports)
    assert (reports[0].done, reports[-1].done, reports[-1].total) == (0, 37, 37)


def test_beginnings_of_completions_are_scored_where_they_are_asked_for(
    model_source: str, encoded: Dataset, expected: list[EncodedGroup]
) -> None:
    connect = Reference(model_source).connect
    made = score(
        encoded, f"{encoded.uri}-scored", by_deployment(connect, lambda report: None, heads=True), lambda report: None
    )
    for group, wanted in zip(dataset.read_groups(made), expected, strict=True):
        assert group.ref_logps == pytest.approx(wanted.ref_logps, abs=1e-4)
        assert group.ref_head_logps == pytest.approx(wanted.ref_head_logps, abs=1e-4)


def test_a_call_whose_replica_died_is_sent_again(
    model_source: str, encoded: Dataset, expected: list[EncodedGroup]
) -> None:
    reference, reports = Reference(model_source, deaths=3), list[Any]()
    assert_same(scored(encoded, reference, reports), expected)
    assert reference.connections == 4
    (warning,) = [report.message for report in reports if isinstance(report, Message)]
    assert warning.startswith("A replica of the reference model died while it scored;")


def test_a_reference_that_keeps_dying_ends_the_attempt(model_source: str, encoded: Dataset) -> None:
    with pytest.raises(RayActorError):
        scored(encoded, Reference(model_source, deaths=100), [])


def test_parts_that_have_their_scores_are_not_scored_again(
    model_source: str, encoded: Dataset, expected: list[EncodedGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_scores, "CALLS_IN_FLIGHT", 1)
    dying = Reference(model_source)
    dying.calls_left = 2  # of 16 groups each
    with pytest.raises(RayActorError):
        scored(encoded, dying, [])
    second, reports = Reference(model_source), list[Any]()
    assert_same(scored(encoded, second, reports), expected)
    assert (reports[0].done, reports[-1].done) == (30, 37)
    assert len(second.calls) == 1, "the 30 groups of the first part were scored before"


def test_the_logps_of_tokens_are_those_that_the_sums_are_made_of(
    model_source: str, encoded: Dataset, expected: list[EncodedGroup]
) -> None:
    groups = list(dataset.read_groups(encoded))
    found = served_token_logps(groups, Reference(model_source).connect, lambda report: None)
    for group, logps in zip(expected, found, strict=True):
        assert [len(row) for row in logps] == group.num_learned
        assert [sum(row) for row in logps] == pytest.approx(group.ref_logps, abs=1e-4)
