"""Tests `raydpo sweeps` against a control plane with stand-ins for Ray and for the served models."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from services.cli.app import app
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import (  # noqa: F401  # fixtures
    API_KEY,
    FakeRay,
    api,
    base_url,
    fake_ray,
    offline,
    pairs,
    storage_url,
)
from tests.services.control_plane.evaluations.conftest import until
from tests.services.control_plane.sweeps.conftest import (  # noqa: F401  # fixtures
    begun,
    calm,
    engines,
    look,
    no_sweep_is_left,
    settings,
    settings_of_evaluations,
    train,
)

pytestmark = pytest.mark.slow

SWEEP = """
job:
  model: tiny
  training_file: pairs.jsonl
  method: {type: dpo}
  x_raydpo: {validation_share: 0.2}
parameters:
  method.dpo.hyperparameters.beta: {values: [0.1, 0.5]}
max_running_jobs: 1
metric: {name: eval/loss}
evaluations:
  words: {kind: score, judge: {type: length}, file: prompts.jsonl}
  moved: {kind: drift, file: prompts.jsonl}
"""


@pytest.fixture
def raydpo(base_url: str) -> Callable[..., str]:  # noqa: F811
    def run(*arguments: str, status: int = 0) -> str:
        environment = {"RAYDPO_URL": f"{base_url}/v1", "RAYDPO_API_KEY": API_KEY}
        result = CliRunner().invoke(app, ["sweeps", *arguments], env=environment)
        assert result.exit_code == status, result.output
        return str(result.stdout if status == 0 else result.output)

    return run


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "pairs.jsonl").write_bytes(pairs())
    rows = [{"prompt": f"Question {number}", "chosen": "a good one", "rejected": "a bad one"} for number in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return str(tmp_path / "sweep.yaml")


def test_a_sweep_of_a_file_is_created_shown_and_drawn(
    raydpo: Callable[..., str],
    api: httpx.Client,  # noqa: F811
    settings: Settings,  # noqa: F811
    fake_ray: FakeRay,  # noqa: F811
    config: str,
    tmp_path: Path,
) -> None:
    sweep_id = raydpo("create", config).strip()
    for number, loss in enumerate((0.5, 0.4)):
        train(settings, fake_ray, begun(api, sweep_id, number)["job_id"], [loss])
    until(lambda: look(api, sweep_id)["status"] == "succeeded")
    rows = [line.split("\t") for line in raydpo("show", sweep_id).splitlines()]
    assert [row[:4] for row in rows] == [["1", "0.5", "0.4", "succeeded"], ["0", "0.1", "0.5", "succeeded"]]
    shown = json.loads(raydpo("show", sweep_id, "--json"))
    assert (shown["best"]["id"], len(shown["data"])) == ("1", 2)
    assert raydpo("list").split("\t")[:4] == [sweep_id, "grid", "beta", "succeeded, 2 of 2 trials, 2 succeeded"]
    table = [line.split("\t") for line in raydpo("frontier", sweep_id).splitlines()]
    assert [(row[1], row[4], row[5]) for row in table] == [("0.1", "3", "3 to 3"), ("0.5", "3", "3 to 3")]
    assert json.loads(raydpo("frontier", sweep_id, "--json"))["kl"] == "moved/kl_per_sequence"
    raydpo("frontier", sweep_id, "--output", str(tmp_path / "a.svg"), "--reward", "words")
    assert (tmp_path / "a.svg").stat().st_size > 1000
    assert "has ended (succeeded)" in raydpo("cancel", sweep_id, status=1)


def test_a_sweep_that_is_cancelled_ends_and_says_so(raydpo: Callable[..., str], config: str) -> None:
    sweep_id = raydpo("create", config).strip()
    assert raydpo("cancel", sweep_id) == f"cancelled {sweep_id}\n"
    assert "cancelled" in raydpo("list").splitlines()[0]
    assert raydpo("delete", sweep_id) == f"deleted {sweep_id}\n"


def test_what_the_service_refuses_is_said_in_one_line(raydpo: Callable[..., str], config: str) -> None:
    Path(config).write_text(SWEEP.replace("[0.1, 0.5]", "[0.1, -1]"))
    assert "beta is -1" in raydpo("create", config, status=1)
    Path(config).write_text("- 1")
    assert "write fields of POST /x/sweeps" in raydpo("create", config, status=1)
    Path(config).write_text(SWEEP.replace("pairs.jsonl", "nothing.jsonl"))
    assert "nothing.jsonl is neither a local file" in raydpo("create", config, status=1)
