"""Tests the JSON objects of sweeps."""

from datetime import UTC, datetime

from services.control_plane.core.tables import Job, Sweep, SweepTrial
from services.control_plane.sweeps.frontier import Axes
from services.control_plane.sweeps.responses import frontier_object, sweep_object

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_a_request_is_shown_without_what_it_left_out_but_its_job_as_it_was_sent() -> None:
    spec = {"job": {"suffix": None}, "metric": None, "parameters": {"a": {"values": [1], "min": None}}}
    row = Sweep(id="sweep-1", created_at=NOW, spec=spec, state="running", num_trials=1)
    assert sweep_object(row, {}, None)["request"] == {"job": {"suffix": None}, "parameters": {"a": {"values": [1]}}}


def test_a_trial_without_both_results_has_no_point() -> None:
    def trial(number: int, **results: dict[str, dict[str, float]]) -> tuple[SweepTrial, Job]:
        job = Job(id=f"ftjob-{number}", fine_tuned_model="ft:m", spec={"config": {"objective": {"type": "ipo"}}})
        return SweepTrial(number=number, parameters={"beta": number}, results=results, job_id=job.id), job

    rows = [
        trial(0, kl={"kl_per_sequence": {"value": 2}}, words={"score": {"value": 1}}),
        trial(1, kl={"kl_per_sequence": {"value": 1}}),
    ]
    axes = Axes(("kl", "kl_per_sequence"), ("words", "score"))
    found = frontier_object(Sweep(id="sweep-1"), rows, axes)
    assert [(point["trial"], point["method"]) for point in found["data"]] == [("0", "ipo")]
    assert (found["kl"], found["reward"]) == ("kl/kl_per_sequence", "words/score")
