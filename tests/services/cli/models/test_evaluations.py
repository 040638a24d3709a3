"""Tests `raydpo evaluations` against a control plane with a stand-in for the served models."""

import csv
import io
import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from services.cli.app import app
from services.cli.models.evaluations import result_rows
from tests.services.control_plane.conftest import (  # noqa: F401  # fixtures
    API_KEY,
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
)


@pytest.fixture
def raydpo(base_url: str, policy: str) -> Callable[..., str]:  # noqa: F811
    def run(*arguments: str, status: int = 0) -> str:
        environment = {"RAYDPO_URL": f"{base_url}/v1", "RAYDPO_API_KEY": API_KEY}
        result = CliRunner().invoke(app, ["evaluations", *arguments], env=environment)
        assert result.exit_code == status, result.output
        return str(result.output)

    return run


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    rows = [{"prompt": f"Question {i}", "chosen": "a good one", "rejected": "a bad one"} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_two_models_are_compared_on_a_file_and_the_results_printed(raydpo: Callable[..., str], file: str) -> None:
    told = raydpo("create", "compare", "--model", POLICY, "--judge", "fair", "--file", file, "--watch")
    evaluation_id, *lines = told.splitlines()
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in lines}
    assert rows["evaluation"] == [evaluation_id, ""]
    assert (rows["baseline"][0], rows["judge"][0], rows["state"][0]) == ("tiny", "fair", "succeeded")
    assert rows["win rate"] == ["100.0%", "100.0% to 100.0%"]
    assert rows["agreement"][0] == "100.0%"
    assert rows["answers model mean tokens"][0] == "3"
    assert raydpo("show", evaluation_id).splitlines() == lines
    assert json.loads(raydpo("show", evaluation_id, "--json"))["results"]["num_wins"] == 4
    results = {
        row["name"]: row for row in csv.DictReader(io.StringIO(raydpo("show", evaluation_id, "--format", "csv")))
    }
    assert results["win_rate"] == {"name": "win_rate", "value": "1.0", "low": "1.0", "high": "1.0"}
    mean_tokens = {"name": "answers.model.mean_tokens", "value": "3.0", "low": "", "high": ""}
    assert results["answers.model.mean_tokens"] == mean_tokens
    assert "leave out --json" in raydpo("show", evaluation_id, "--json", "--format", "csv", status=1)
    assert raydpo("list").split("\t")[0] == evaluation_id
    table = list(csv.DictReader(io.StringIO(raydpo("items", evaluation_id, "--format", "csv"))))
    assert [row["found.outcome"] for row in table] == ["win"] * 4
    assert "has ended (succeeded)" in raydpo("cancel", evaluation_id, status=1)
    assert raydpo("delete", evaluation_id) == f"deleted {evaluation_id}\n"


def test_an_evaluation_is_paused_and_resumed(raydpo: Callable[..., str], file: str, engines: Engines) -> None:  # noqa: F811
    engines.delay = 0.2
    evaluation_id = raydpo("create", "score", "--model", POLICY, "--judge", "length", "--file", file).strip()
    assert raydpo("pause", evaluation_id) == f"paused {evaluation_id}\n"
    assert "paused" in raydpo("show", evaluation_id)
    assert "has no results: it is paused" in raydpo("show", evaluation_id, "--format", "csv", status=1)
    assert raydpo("resume", evaluation_id) == f"resumed {evaluation_id}\n"
    assert "only a paused evaluation can be resumed" in raydpo("resume", evaluation_id, status=1)


@pytest.mark.parametrize(("judge", "value"), [("length", "3"), ("exact", "0"), ("regex:[13]$", "0.5")])
def test_answers_are_scored_by_rules(raydpo: Callable[..., str], file: str, judge: str, value: str) -> None:
    told = raydpo("create", "score", "--model", POLICY, "--judge", judge, "--file", file, "--watch")
    assert f"score\t{value}\t" in told


def test_several_answers_are_scored_by_the_implicit_reward(raydpo: Callable[..., str], file: str) -> None:
    options = ("--judge", "implicit", "--beta", "2", "--reference", "fair", "--num-samples", "3")
    told = raydpo("create", "samples", "--model", POLICY, *options, "--file", file, "--watch")
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in told.splitlines()[1:]}
    assert rows["judge"][0] == "implicit"
    assert float(rows["worst"][0]) < float(rows["score"][0]) < float(rows["best"][0])


def test_the_drift_is_printed_with_its_estimator(raydpo: Callable[..., str], file: str) -> None:
    told = raydpo("create", "drift", "--model", POLICY, "--reference", "fair", "--file", file, "--watch")
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in told.splitlines()[1:]}
    assert rows["reference"][0] == "fair"
    assert rows["kl estimator"][0].startswith("k1: ")
    assert " to " in rows["kl per token"][1]


def test_preferences_are_printed_also_by_length(raydpo: Callable[..., str], file: str) -> None:
    told = raydpo("create", "preferences", "--model", POLICY, "--beta", "0.5", "--file", file, "--watch")
    assert "better is similar num items\t4\t" in told
    assert "accuracy\t0.0%\t" in told or "accuracy\t100.0%\t" in told


def test_an_evaluation_that_fails_says_why_and_one_that_is_cancelled_ends(
    raydpo: Callable[..., str],
    file: str,
    engines: Engines,  # noqa: F811
) -> None:
    engines.failing[POLICY] = 1000
    told = raydpo("create", "score", "--model", POLICY, "--judge", "length", "--file", file, "--watch", status=1)
    assert "All items failed" in told
    assert "state\tfailed, 4 of 4 items failed" in raydpo("show", told.splitlines()[0])
    engines.failing.clear()
    engines.is_away = True
    made = raydpo("create", "score", "--model", POLICY, "--judge", "length", "--file", file).strip()
    assert raydpo("cancel", made) == f"cancelled {made}\n"
    assert "state\tcancelled" in raydpo("show", made)


def test_a_result_without_a_value_is_left_out() -> None:
    results = {"win_rate": {"value": 0.5, "low": 0.25, "high": 0.75}, "agreement": None, "answers": {"unfinished": 0.1}}
    assert list(result_rows(results)) == [
        ("win rate", "50.0%", "25.0% to 75.0%"),
        ("answers unfinished", "10.0%", ""),
    ]
