"""Tests the moves between the states of a job, with the drawing in the module's docstring as the oracle."""

from itertools import product

import pytest

from services.control_plane.core.tables import JOB_STATES, TERMINAL, Transition
from services.control_plane.jobs.jobs import replay, wire_metrics

ARROWS = {
    ("queued", "running"),
    ("queued", "paused"),
    ("running", "paused"),
    ("paused", "queued"),
    ("running", "succeeded"),
    ("queued", "failed"),
    ("running", "failed"),
    ("queued", "cancelled"),
    ("running", "cancelled"),
    ("paused", "cancelled"),
}


def transitions(*states: tuple[str, str]) -> list[Transition]:
    return [
        Transition(job_id="ftjob-1", version=number, desired=desired, observed=observed)
        for number, (desired, observed) in enumerate(states, 1)
    ]


@pytest.mark.parametrize(("before", "after"), list(product(JOB_STATES, JOB_STATES)))
def test_a_state_follows_another_only_along_an_arrow(before: str, after: str) -> None:
    story = transitions(("run", before), ("run", after))
    if before == after or (before, after) in ARROWS:
        assert replay(story) == ("run", after, 2)
    else:
        with pytest.raises(ValueError, match=f"went from {before} to {after}, which no rule allows"):
            replay(story)


def test_no_arrow_leaves_a_state_in_which_jobs_end() -> None:
    assert not {before for before, _ in ARROWS} & set(TERMINAL)


def test_a_history_leads_to_the_last_wish_state_and_version() -> None:
    story = transitions(("run", "queued"), ("run", "running"), ("pause", "running"), ("pause", "paused"))
    assert replay(story) == ("pause", "paused", 4)


def test_a_history_with_a_gap_is_refused() -> None:
    first, _, third = transitions(("run", "queued"), ("run", "running"), ("run", "failed"))
    with pytest.raises(ValueError, match="which no rule allows"):
        replay([first, third])


def test_metrics_have_the_names_of_openai_and_those_of_evaluations_both_of_them() -> None:
    given = {"loss": 0.5, "rewards/margins": 1.0, "eval/loss": 0.25, "ours": 3.0}
    assert wire_metrics(given) == {
        "train_loss": 0.5,
        "train_reward_margin": 1.0,
        "full_valid_loss": 0.25,
        "valid_loss": 0.25,
        "ours": 3.0,
    }
