"""Tests `raydpo rounds` against a control plane with stand-ins for the served models and for training."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from services.cli.app import app
from services.cli.models import rounds
from tests.services.control_plane.conftest import (  # noqa: F401  # fixtures
    API_KEY,
    api,
    base_url,
    fake_ray,
    offline,
    storage_url,
)
from tests.services.control_plane.evaluations.conftest import (  # noqa: F401  # fixtures
    POLICY,
    Engines,
    calm,
    engines,
    policy,
    settings,
    until,
)
from tests.services.control_plane.rounds.conftest import quick, reached, train  # noqa: F401  # fixtures


@pytest.fixture
def raydpo(base_url: str, policy: str) -> Callable[..., str]:  # noqa: F811
    def run(*arguments: str, status: int = 0) -> str:
        environment = {"RAYDPO_URL": f"{base_url}/v1", "RAYDPO_API_KEY": API_KEY}
        result = CliRunner().invoke(app, ["rounds", *arguments], env=environment)
        assert result.exit_code == status, result.output
        return str(result.output)

    return run


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Question {i}", "chosen": "a good one", "rejected": "a bad one"} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_rounds_run_to_their_end_and_are_printed_as_a_table(
    raydpo: Callable[..., str],
    file: str,
    api: httpx.Client,  # noqa: F811
    train: Callable[[str], None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounds, "LOOK_SECONDS", 0.1)
    options = ["--model", POLICY, "--file", file, "--judge", "length", "--num-rounds", "1", "--num-samples", "3"]
    options += ["--set", "job.method.dpo.beta=0.5", "--set", "job.x_raydpo.num_workers=2", "--start", "first"]
    with ThreadPoolExecutor(1) as threads:
        told = threads.submit(raydpo, "create", *options, "--watch")
        (made,) = until(lambda: api.get("/x/rounds").json()["data"])
        job_id = reached(api, made["id"], 1, "job")
        train(job_id)
        rounds_id, *lines = told.result(300).splitlines()
    assert rounds_id == made["id"]
    asked = api.get(f"/fine_tuning/jobs/{job_id}").json()["x_raydpo"]["request"]
    assert asked["method"]["dpo"]["hyperparameters"]["beta"] == 0.5
    assert asked["x_raydpo"]["num_workers"] == 2
    rows = [line.split("\t") for line in lines]
    assert rows[0] == ["rounds", rounds_id]
    assert rows[1] == ["state", "succeeded, num rounds"]
    first, last = rows[-2:]
    assert (first[0], first[1], last[0], last[4], last[6]) == ("0", "3 (3 to 3)", "1", "12", job_id)
    assert raydpo("show", rounds_id).splitlines() == lines
    assert json.loads(raydpo("show", rounds_id, "--json"))["best_round"] == 0
    assert raydpo("list").split("\t")[0] == rounds_id
    assert "have ended (succeeded)" in raydpo("cancel", rounds_id, status=1)
    assert raydpo("delete", rounds_id) == f"deleted {rounds_id}\n"


def test_rounds_of_a_config_file_are_paused_resumed_and_cancelled(
    raydpo: Callable[..., str],
    file: str,
    tmp_path: Path,
    engines: Engines,  # noqa: F811
) -> None:
    engines.delay = 0.2
    config = tmp_path / "rounds.yaml"
    config.write_text("model: tiny\njudge: {type: model, model: fair}\nnum_rounds: 5\njob: {suffix: a}\n")
    rounds_id = raydpo("create", "--config", str(config), "--file", file, "--method", "simpo", "--criteria", "Short.")
    rounds_id = rounds_id.strip()
    told = json.loads(raydpo("show", rounds_id, "--json"))["request"]
    assert told["judge"]["criteria"] == "Short."
    assert (told["num_rounds"], told["job"]) == (5, {"suffix": "a", "method": {"type": "simpo"}})
    assert raydpo("pause", rounds_id) == f"paused {rounds_id}\n"
    assert "paused, round 0, " in raydpo("show", rounds_id)
    assert raydpo("resume", rounds_id) == f"resumed {rounds_id}\n"
    assert raydpo("cancel", rounds_id) == f"cancelled {rounds_id}\n"


def test_a_wrong_field_is_told_in_one_line(raydpo: Callable[..., str], file: str) -> None:
    told = raydpo("create", "--model", "tiny", "--file", file, "--judge", "fair", "--selection", "rso", status=1)
    assert "only compares answers" in told
