"""Tests a sweep of five β on a real Ray and vLLM: its file is prepared once, and the frontier is drawn."""

import json
import logging
from pathlib import Path
from typing import Any

import openai
import pytest

from demo.rows import IS_COURTEOUS
from services.cli.jobs.frontier_picture import draw
from tests.e2e.conftest import Service, wait_for
from tests.e2e.test_rounds import HELD_OUT, SHOP, chats, first_policy, service  # noqa: F401  # a fixture
from tests.e2e.test_service import messages

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(3600)]

log = logging.getLogger(__name__)

BETA = "method.dpo.hyperparameters.beta"
BETAS = [0.05, 0.1, 0.2, 0.5, 1.0]
PAIRS = [
    {
        "input": {"messages": [{"role": "user", "content": prompt}]},
        "preferred_output": [{"role": "assistant", "content": chosen}],
        "non_preferred_output": [{"role": "assistant", "content": rejected}],
    }
    for prompt, chosen, rejected in SHOP.pairs(480)
]


def swept(client: openai.OpenAI, policy: str) -> str:
    """Creates the sweep, and returns its id."""
    rows = "\n".join(map(json.dumps, PAIRS)).encode()
    file = client.files.create(file=("pairs.jsonl", rows), purpose="fine-tune")
    schedule = {"n_epochs": 4, "batch_size": 16, "learning_rate": 4e-4}
    asked = {"rows": chats(HELD_OUT[:120]), "sampling": {"max_tokens": 40}}
    body = {
        "job": {
            "model": policy,
            "training_file": file.id,
            "method": {"type": "dpo", "dpo": {"hyperparameters": schedule}},
            "x_raydpo": {"adapter": "none"},
        },
        "parameters": {BETA: {"values": BETAS}},
        "evaluations": {
            "courteous": {"kind": "score", "judge": {"type": "regex", "pattern": IS_COURTEOUS}, **asked},
            "moved": {"kind": "drift", **asked},
        },
    }
    created: Any = client.post("/x/sweeps", body=body, cast_to=object)
    return str(created["id"])


def test_five_betas_prepare_their_file_once_and_draw_the_frontier(
    service: Service,  # noqa: F811
    tmp_path: Path,
) -> None:
    with service.client() as client:
        sweep_id = swept(client, first_policy(client))

        def ended() -> Any:
            found: Any = client.get(f"/x/sweeps/{sweep_id}", cast_to=object)
            return found if found["status"] != "running" else None

        sweep = wait_for(ended, "the sweep ends", seconds=3000)
        assert (sweep["status"], sweep["trials"]) == ("succeeded", {"succeeded": 5}), sweep
        trials: Any = client.get(f"/x/sweeps/{sweep_id}/trials", cast_to=object)
        told = [" ".join(messages(client, trial["job_id"])) for trial in trials["data"]]
        for found in ("the token ids are known from an earlier job", "scores of these rows are known from an earlier"):
            assert sorted(found in each for each in told) == [False, True, True, True, True], told
        frontier: Any = client.get(f"/x/sweeps/{sweep_id}/frontier", cast_to=object)
    log.info("%s", json.dumps(frontier, indent=1))
    points = {point["parameters"][BETA]: point for point in frontier["data"]}
    assert sorted(points) == BETAS
    for point in points.values():
        for axis in ("kl", "reward"):
            assert point[axis]["low"] <= point[axis]["value"] <= point[axis]["high"]
    drifts = [point["kl"] for point in points.values()]
    assert max(drift["low"] for drift in drifts) > min(drift["high"] for drift in drifts)  # the policies differ
    draw(frontier, tmp_path / "frontier.svg")
    picture = (tmp_path / "frontier.svg").read_text()
    assert all(f"beta {beta}" in picture for beta in BETAS)
