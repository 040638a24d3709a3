"""Tests which jobs cannot be deleted because something else needs them or their models."""

from typing import Any

import httpx
import openai
import psycopg
import pytest
from psycopg.types.json import Jsonb

from services.control_plane.settings import Settings
from tests.services.control_plane.jobs.deletion.conftest import Train, policy_of

SWEEP = "INSERT INTO sweeps (id, project_id, key_id, spec, state, num_trials, finished_at)"
ROUNDS = "INSERT INTO rounds (id, project_id, key_id, spec, prompts, state, history, finished_at)"


def test_a_job_of_a_sweep_or_of_rounds_goes_after_these(train: Train, api: httpx.Client, settings: Settings) -> None:
    of_sweep, of_rounds = train(), train()
    with psycopg.connect(settings.database_url) as rows:
        rows.execute(f"{SWEEP} VALUES ('sweep-1', 'proj_default', 'k', '{{}}', 'cancelled', 1, now())")
        rows.execute(
            "INSERT INTO sweep_trials (sweep_id, number, parameters, state, job_id, evaluations, results)"
            " VALUES ('sweep-1', 0, '{}', 'cancelled', %s, '{}', '{}')",
            [of_sweep],
        )
        history = Jsonb([{"number": 0, "model": "tiny"}, {"number": 1, "job": of_rounds}])
        rows.execute(
            f"{ROUNDS} VALUES ('rounds-1', 'proj_default', 'k', '{{}}', '{{}}', 'cancelled', %s, now())", [history]
        )
    for job_id, owner in ((of_sweep, "sweep sweep-1"), (of_rounds, "rounds rounds-1")):
        answer = api.delete(f"/x/jobs/{job_id}")
        assert answer.status_code == 400
        assert f"belongs to the {owner}; delete the {owner.split()[0]} first" in answer.json()["error"]["message"]
    assert api.delete("/x/sweeps/sweep-1").status_code == 200
    assert api.delete("/x/rounds/rounds-1").status_code == 200
    for job_id in (of_sweep, of_rounds):
        assert api.delete(f"/x/jobs/{job_id}").status_code == 200


def test_a_job_stays_whole_if_one_of_its_models_is_needed(
    train: Train, client: openai.OpenAI, api: httpx.Client
) -> None:
    job_id = train()
    training_file = client.fine_tuning.jobs.retrieve(job_id).training_file
    later: Any = client.fine_tuning.jobs.create(
        model=policy_of(job_id), training_file=training_file, method={"type": "dpo"}
    )
    answer = api.delete(f"/x/jobs/{job_id}", params={"models": True})
    assert answer.status_code == 400
    assert f"is used by the job {later.id}" in answer.json()["error"]["message"]
    assert len(client.fine_tuning.jobs.checkpoints.list(job_id).data) == 1
    client.fine_tuning.jobs.cancel(later.id)
    assert api.delete(f"/x/jobs/{job_id}", params={"models": True}).status_code == 200


@pytest.mark.usefixtures("base_url")
def test_the_database_lets_only_the_transitions_of_deleted_jobs_go(train: Train, settings: Settings) -> None:
    job_id = train()
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        for change in ("DELETE FROM transitions", "UPDATE transitions SET reason = ''", "TRUNCATE transitions"):
            with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
                rows.execute(change)
        rows.execute("UPDATE jobs SET deleted_at = now() WHERE id = %s", [job_id])
        with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
            rows.execute("UPDATE transitions SET reason = '' WHERE job_id = %s", [job_id])
        rows.execute("DELETE FROM transitions WHERE job_id = %s", [job_id])
