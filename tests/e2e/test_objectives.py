"""Tests every objective of the engine through the API, with the unmodified client and rows that it learns from."""

import csv
import math
from typing import Any

import openai
import pytest

from dpo_core.methods import METHODS
from dpo_core.options import OBJECTIVES
from tests.e2e.test_service import finished, messages
from tests.services.training.run.test_objectives import ROWS

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def jobs(service: Any) -> dict[str, str]:
    """Creates one job for each objective, and returns their ids. The jobs run one after another while the tests
    wait."""
    with service.client() as client:
        files = {
            kind: client.files.create(file=("rows.jsonl", rows.lines), purpose="fine-tune").id
            for kind, rows in ROWS.items()
        }
        return {
            method: client.fine_tuning.jobs.create(
                model="tiny",
                training_file=files[OBJECTIVES[method]().traits.learns_from[0]],
                method={"type": method, method: {"hyperparameters": {"n_epochs": 1, "batch_size": 4}}},  # type: ignore[typeddict-item,misc]
                seed=1,
            ).id
            for method in METHODS
        }


@pytest.mark.parametrize("method", METHODS)
def test_an_objective_is_trained(client: openai.OpenAI, jobs: dict[str, str], method: str) -> None:
    job = finished(client, jobs[method])
    told = messages(client, job.id)
    assert job.status == "succeeded", told
    rows = list(csv.DictReader(client.files.content(job.result_files[0]).text.splitlines()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    assert all(math.isfinite(float(row["train_loss"])) and float(row["grad_norm"]) > 0 for row in rows)
    traits = OBJECTIVES[method]().traits
    assert any("; the reference model is tiny" in message for message in told) == traits.needs_reference
    assert job.method.to_dict()["type"] == method
    kind = client.models.retrieve(job.fine_tuned_model).to_dict()["x_raydpo"]["kind"]  # type: ignore[index]
    assert kind == ("reward" if traits.num_outputs else "policy")
    if traits.num_outputs:
        with pytest.raises(openai.BadRequestError, match="is a reward model"):
            client.chat.completions.create(model=job.fine_tuned_model, messages=[{"role": "user", "content": "Hi"}])
