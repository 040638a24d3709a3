"""Tests `raydpo rewards` against a control plane with trained models."""

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from services.cli.app import app
from services.cli.models import rewards
from services.cli.models.reward_summary import Summary
from services.contract import MIN_EXAMPLES
from tests.services.control_plane import conftest as control_plane
from tests.services.control_plane.conftest import API_KEY, FakeRay
from tests.services.control_plane.rewards import conftest as trained
from tests.services.control_plane.rewards.conftest import BETA
from tests.services.serving.conftest import MODEL_LENGTH

api, base_url, fake_ray = control_plane.api, control_plane.base_url, control_plane.fake_ray
offline, storage_url = control_plane.offline, control_plane.storage_url
models, rows, settings = trained.models, trained.rows, trained.settings

PAIR = {"prompt": "the quick", "chosen": " brown fox", "rejected": " lazy dog"}
BENCH = {"prompt": "fox?", "chosen": ["the quick brown fox"], "rejected": ["dog", "no", "lazy"], "subset": "Focus"}


def result(ratings: list[float] | None, *given: float, subset: str | None = None) -> dict[str, Any]:
    return {"ratings": ratings, "subset": subset, "completions": [{"reward": reward} for reward in given]}


def test_a_row_counts_if_all_of_its_best_completions_lead_all_others() -> None:
    summary = Summary()
    for each in (
        result([1.0, 0.0], 2.0, 1.0),
        result([1.0, 0.0], 1.0, 1.0),
        result([3.0, 2.0, 3.0], 0.5, 0.0, 0.25, subset="a"),
        result([1.0, 1.0, 0.0, 0.0], 4.0, 1.0, 2.0, 0.0, subset="b"),
        result(None, 1.0, 2.0),
        result([1.0], 1.0),
        result([0.5, 0.5], 1.0, 2.0),
    ):
        summary.add(each)
    assert list(summary.lines()) == [
        "a: accuracy 100.00%  margin 0.3750  rows 1",
        "b: accuracy 0.00%  margin 1.5000  rows 1",
        "mean of 2 subsets: accuracy 50.00%",
        "all: accuracy 50.00%  margin 0.7188  rows 4",
    ]
    assert list(Summary().lines()) == []


@pytest.fixture
def run(base_url: str, tmp_path: Path, rows: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("RAYDPO_API_KEY", API_KEY)
    monkeypatch.setenv("RAYDPO_URL", f"{base_url}/v1")

    def run(given: object, *options: object, model: str = "ft:tiny:raydpo::dpo") -> Result:
        file = given if isinstance(given, (str, Path)) else write(tmp_path, given)
        return CliRunner().invoke(app, ["rewards", str(file), "--model", model, *map(str, options)])

    return run


def write(folder: Path, given: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    return file


def results(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def summed(found: Result) -> list[str]:
    assert found.exit_code == 0, found.output
    return [line for line in found.stderr.splitlines() if "accuracy" in line]


@pytest.mark.slow
def test_pairs_have_the_rewards_of_the_route_an_accuracy_and_a_margin(
    run: Callable[..., Result],
    api: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rewards, "ROWS_AT_A_TIME", 2)
    turned = PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    found = run([PAIR, PAIR, turned])
    (line,) = summed(found)
    row = {"prompt": PAIR["prompt"], "completions": [PAIR["chosen"], PAIR["rejected"]]}
    body = {"model": "ft:tiny:raydpo::dpo", "rows": [row]}
    (asked,) = api.post("/x/rewards", json=body).json()["data"]
    better, worse = (each["reward"] for each in asked["completions"])
    assert better > worse  # as it was trained
    assert line == f"all: accuracy 66.67%  margin {(better - worse) / 3:.4f}  rows 3"
    printed = results(found.stdout)
    assert [each["line"] for each in printed] == [1, 2, 3]
    assert [each["reward"] for each in printed[0]["completions"]] == pytest.approx([better, worse], abs=1e-6)
    assert (printed[0]["ratings"], printed[0]["beta"], printed[2]["winner"]) == ([1.0, 0.0], BETA, 1)


@pytest.mark.slow
def test_a_benchmark_has_an_accuracy_by_subset(run: Callable[..., Result]) -> None:
    found = run([BENCH, BENCH | {"subset": "Safety"}], model="ft:tiny:raydpo::reward")
    names = [line.partition(":")[0] for line in summed(found)]
    assert names == ["Focus", "Safety", "mean of 2 subsets", "all"]
    assert [each["ratings"] for each in results(found.stdout)] == [[1.0, 0.0, 0.0, 0.0]] * 2


@pytest.mark.slow
def test_every_answer_of_a_conversation_is_scored(run: Callable[..., Result], tmp_path: Path) -> None:
    user, fox, dog = ({"role": role, "content": role} for role in ("user", "assistant", "assistant"))
    packed = tmp_path / "chat.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"messages": [user, fox, user, dog]}).encode()))
    found = run(packed)
    assert summed(found) == []
    places = [(each["line"], each["group"], each["ratings"]) for each in results(found.stdout)]
    assert places == [(1, 1, None), (1, 2, None)]


@pytest.mark.slow
def test_a_command_that_ended_early_goes_on_after_what_it_wrote(run: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "rewards.jsonl"
    whole = run([PAIR] * 4, "--out", out)
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    out.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    again = run([PAIR] * 4, "--out", out)
    assert "has the rewards up to line 2" in again.stderr
    assert summed(again) == summed(whole)
    assert [each["line"] for each in results(out.read_text())] == [1, 2, 3, 4]
    other = run([PAIR] * 4, "--out", out, "--beta", 1)
    assert other.exit_code == 1
    assert f"already has rewards with the beta {BETA}, not 1.0; choose another file with --out" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "x", "chosen": "y", "rejected": 5}, "Line 2: the field /rejected is 5; it must be a string."),
        ({"prompt": "x", "chosen": "y", "rejected": "x" * MODEL_LENGTH}, "Line 2, completions.1 and its prompt have"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named_by_its_line(run: Callable[..., Result], row: object, said: str) -> None:
    found = run([PAIR, row])
    assert found.exit_code == 1
    assert said in found.stderr


@pytest.mark.slow
def test_a_request_that_is_too_large_is_divided(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.serving.scoring.MOST_TOKENS", 25)
    found = run([PAIR] * 5)
    assert len(results(found.stdout)) == 5
    monkeypatch.setattr("services.serving.scoring.MOST_TOKENS", 9)
    assert "rows have" in run([PAIR]).stderr


@pytest.mark.slow
def test_a_model_that_is_not_up_is_asked_again(
    run: Callable[..., Result], fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    waited: list[float] = []
    get = fake_ray.get

    def get_once_failed(path: str) -> tuple[int, Any]:
        status, answer = get(path)
        if path.startswith("/api/serve") and not waited:
            failed = {name: app | {"status": "DEPLOY_FAILED"} for name, app in answer["applications"].items()}
            answer = answer | {"applications": failed}
        return status, answer

    assert run([PAIR]).exit_code == 0  # so that there is an application
    monkeypatch.setattr("services.control_plane.ray_api.VIEW_SECONDS", 0.0)
    monkeypatch.setattr("services.control_plane.inference.inference.VIEW_SECONDS", 0.0)
    monkeypatch.setattr(fake_ray, "get", get_once_failed)
    monkeypatch.setattr(rewards._Voice, "say", lambda _, text: told.append(text))
    monkeypatch.setattr(rewards, "time", SimpleNamespace(sleep=waited.append, monotonic=time.monotonic))
    assert len(results(run([PAIR]).stdout)) == 1
    assert "could not be loaded" in told[0]
    assert waited == [15.0]


@pytest.mark.slow
def test_a_file_of_the_service_is_read_by_its_id(run: Callable[..., Result], api: httpx.Client) -> None:
    content = "".join(json.dumps(PAIR) + "\n" for _ in range(MIN_EXAMPLES))
    file = api.post("/files", files={"file": ("pairs.jsonl", content)}, data={"purpose": "fine-tune"}).json()
    assert len(results(run(file["id"]).stdout)) == MIN_EXAMPLES
    assert "No such file or directory" in run("nothing.jsonl").stderr
