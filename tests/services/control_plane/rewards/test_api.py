"""Tests rewards through the control plane against the trainer's scorer and plain transformers."""

import re
from pathlib import Path
from shutil import copytree
from typing import Any

import httpx
import psycopg
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dpo_core.encoding.encode import EncodedGroup, encode_group
from dpo_core.models.model import load_policy, load_tokenizer
from dpo_core.objectives.metrics import compute_metrics
from dpo_core.options import Dpo, Mpo, Supervised
from dpo_core.policy.measures import Measures
from dpo_core.policy.scorer import Scorer, score_reference
from services.control_plane.rewards.requests import MOST_COMPLETIONS, MOST_ROWS
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import FakeRay, api_of, new_key, new_project, served
from tests.services.control_plane.rewards.conftest import ASKED, BETA, PAIR, Trained, add, policy_of
from tests.services.serving.conftest import MODEL_LENGTH
from tests.services.serving.test_scoring import ROWS, SYSTEM, TOOL, TURNS, USER, groups_of, said

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("rows")]  # it trains


def ask(api: httpx.Client, name: str, rows: object = ROWS, **more: object) -> httpx.Response:
    model = name if name in ("tiny", "other") else f"ft:tiny:raydpo::{name}"
    return api.post("/x/rewards", json={"model": model, "rows": rows, **more})


def answered(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refused(answer: httpx.Response, status: int = 400) -> tuple[str, str]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


def logps(folder: Path, groups: list[EncodedGroup]) -> list[tuple[float, ...]]:
    """Returns the log-probabilities of the groups from the trainer's scorer, with the policy's adapter if it has
    one."""
    return [group.ref_logps or () for group in score_reference(policy_of(folder), groups, max_tokens_per_pack=512)]


@torch.inference_mode()
def plain_logp(model: Any, group: EncodedGroup, completion: int) -> float:
    ids = [*group.prompt_ids, *group.completion_ids[completion]]
    logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(group.prompt_ids)
    return sum(logps[start + i - 1, ids[start + i]].item() for i in group.learned(completion))


# --- what is answered ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "adapter"])
def test_rewards_are_those_of_the_trainer(api: httpx.Client, models: Trained, name: str) -> None:
    """The rows have texts, messages with a system prompt, tools, and completions of several turns."""
    found = answered(ask(api, name))
    assert (found["model"], found["reference"], found["beta"]) == (f"ft:tiny:raydpo::{name}", "tiny", BETA)
    groups = [encode_group(group, load_tokenizer(models[name])) for group in groups_of(ROWS)]
    policy, reference = logps(models[name], groups), logps(models.base, groups)
    for row, group, own, others in zip(found["data"], groups, policy, reference, strict=True):
        assert [each["num_tokens"] for each in row["completions"]] == group.num_learned
        assert [each["logp"] for each in row["completions"]] == pytest.approx(own, abs=1e-4, rel=0)
        assert [each["reference_logp"] for each in row["completions"]] == pytest.approx(others, abs=1e-4, rel=0)
        rewards = [BETA * (logp - other) for logp, other in zip(own, others, strict=True)]
        assert [each["reward"] for each in row["completions"]] == pytest.approx(rewards, abs=1e-4, rel=0)
        assert row["winner"] == rewards.index(max(rewards))
        softmax = torch.tensor(rewards).softmax(0).tolist()
        assert [each["probability"] for each in row["completions"]] == pytest.approx(softmax, abs=1e-4)
    assert max(abs(each["reward"]) for row in found["data"] for each in row["completions"]) > 0.1
    read = 2 * sum(len(group.prompt_ids) + len(ids) for group in groups for ids in group.completion_ids)
    assert found["usage"] == {"prompt_tokens": read, "total_tokens": read}


def test_the_mean_margin_is_that_of_the_trainers_metrics(api: httpx.Client, models: Trained) -> None:
    group = encode_group(PAIR, load_tokenizer(models.base))
    (scored,) = score_reference(load_policy(models.base), [group], max_tokens_per_pack=512)
    scorer = Scorer(load_policy(models["dpo"]))
    with torch.no_grad():
        metrics = compute_metrics(Dpo(beta=BETA), Measures([scored], scorer(scorer.collate([scored]))))
    (row,) = answered(ask(api, "dpo", [{"prompt": PAIR.prompt, "completions": PAIR.completions}]))["data"]
    chosen, rejected = (each["reward"] for each in row["completions"])
    assert chosen == pytest.approx(metrics["rewards/chosen"].item(), abs=1e-4)
    assert chosen - rejected == pytest.approx(metrics["rewards/margins"].item(), abs=1e-4)


def test_rewards_are_those_of_plain_transformers(api: httpx.Client, models: Trained) -> None:
    found = answered(ask(api, "dpo"))
    policy, reference = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (models["dpo"], models.base))
    for row, group in zip(found["data"], groups_of(ROWS), strict=True):
        encoded = encode_group(group, load_tokenizer(models.base))
        for place, each in enumerate(row["completions"]):
            log_ratio = plain_logp(policy, encoded, place) - plain_logp(reference, encoded, place)
            assert each["log_ratio"] == pytest.approx(log_ratio, abs=1e-4, rel=0)


def test_another_reference_and_beta_are_those_named(api: httpx.Client, models: Trained) -> None:
    found = answered(ask(api, "adapter", ROWS[:1], reference="ft:tiny:raydpo::dpo", beta=1.5))
    assert (found["reference"], found["beta"]) == ("ft:tiny:raydpo::dpo", 1.5)
    groups = [encode_group(group, load_tokenizer(models.base)) for group in groups_of(ROWS[:1])]
    (own,), (others,) = logps(models["adapter"], groups), logps(models["dpo"], groups)
    rewards = [1.5 * (logp - other) for logp, other in zip(own, others, strict=True)]
    assert [each["reward"] for each in found["data"][0]["completions"]] == pytest.approx(rewards, abs=1e-4, rel=0)


def test_a_policy_is_no_better_than_itself(api: httpx.Client) -> None:
    (row,) = answered(ask(api, "tiny", ROWS[:1], reference="tiny", beta=2))["data"]
    assert [each["reward"] for each in row["completions"]] == pytest.approx([0, 0, 0], abs=1e-6)
    assert [each["probability"] for each in row["completions"]] == pytest.approx([1 / 3] * 3)


def test_a_reward_model_gives_the_outputs_of_transformers(api: httpx.Client, models: Trained) -> None:
    found = answered(ask(api, "reward"))
    assert (found["reference"], found["beta"]) == (None, None)
    model = AutoModelForSequenceClassification.from_pretrained(models["reward"], dtype=torch.float32).eval()
    for row, group in zip(found["data"], groups_of(ROWS), strict=True):
        encoded = encode_group(group, load_tokenizer(models["reward"]))
        for each, ids in zip(row["completions"], encoded.completion_ids, strict=True):
            (wanted,) = model(torch.tensor([[*encoded.prompt_ids, *ids]])).logits[0].tolist()
            assert each["outputs"] == pytest.approx([wanted], abs=1e-4, rel=0)
            assert (each["reward"], each["logp"], each["log_ratio"]) == (each["outputs"][0], None, None)


def test_a_key_for_inference_is_enough_and_a_shared_policy_has_its_base_as_reference(
    api: httpx.Client, base_url: str
) -> None:
    project = new_project(api, "judges")
    reader, asker = (new_key(api, project_id=project, scopes=[scope]) for scope in ("read", "inference"))
    shared = api.post("/fine_tuning/checkpoints/ft:tiny:raydpo::dpo/permissions", json={"project_ids": [project]})
    assert shared.status_code == 200, shared.text
    with api_of(base_url, asker["value"]) as theirs:
        assert answered(ask(theirs, "dpo", ROWS[:1]))["reference"] == "tiny"
        param, _ = refused(ask(theirs, "adapter", ROWS[:1]), 404)
        assert param == "model"
    with api_of(base_url, reader["value"]) as theirs:
        assert "'inference'" in refused(ask(theirs, "dpo", ROWS[:1]), 403)[1]


def test_a_policy_of_a_policy_has_that_as_reference_until_it_is_deleted(
    api: httpx.Client, settings: Settings, models: Trained, tmp_path: Path
) -> None:
    start = Path(copytree(models["dpo"], tmp_path / "start"))
    with psycopg.connect(settings.database_url, autocommit=True) as rows:
        add(rows, "start", start, Dpo(), "tiny", models.base)
        sum_of_two = Mpo(objectives=(Supervised(), Dpo(beta=0.7)), weights=(1, 1))
        add(rows, "next", models["adapter"], sum_of_two, "ft:tiny:raydpo::start", start)
    found = answered(ask(api, "next", ROWS[:1]))
    assert (found["reference"], found["beta"]) == ("ft:tiny:raydpo::start", 0.7)
    assert api.delete("/models/ft:tiny:raydpo::start").status_code == 200
    param, message = refused(ask(api, "next", ROWS[:1]), 404)
    assert param == "reference"
    assert "'ft:tiny:raydpo::next' was deleted, or is not shared with this project" in message
    assert answered(ask(api, "next", ROWS[:1], reference="tiny"))["beta"] == 0.7


def test_scores_that_are_no_numbers_are_an_error_of_the_model(
    api: httpx.Client, settings: Settings, models: Trained, tmp_path: Path
) -> None:
    folder = Path(copytree(models["dpo"], tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1e38 * 1e38
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_core.models.loading._check_finite", lambda *_: None)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with psycopg.connect(settings.database_url, autocommit=True) as rows:
            add(rows, "broken", folder, Dpo(), "tiny", models.base)
        answer = ask(api, "broken", ROWS[:1])
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "model_error"
    assert "returned scores that are not finite numbers" in answer.json()["error"]["message"]


def test_the_tokens_of_both_models_count_for_the_key(api: httpx.Client, base_url: str) -> None:
    project = new_project(api, "counts")
    key = new_key(api, project_id=project, scopes=["inference"], tokens_per_minute=5)
    with api_of(base_url, key["value"]) as theirs:
        read = answered(ask(theirs, "tiny", ROWS[:1], reference="tiny", beta=1))["usage"]["total_tokens"]
        assert "tokens per minute" in refused(ask(theirs, "tiny", ROWS[:1], reference="tiny", beta=1), 429)[1]
    told: tuple[int, int] = (0, 0)
    while told[0] < 2:  # what was used is written every tenth of a second
        found = answered(api.get(f"/x/usage?group_by=model&project_id={project}"))["data"]
        told = next(((each["num_requests"], each["prompt_tokens"]) for each in found if each["id"] == "tiny"), told)
    assert told == (2, read)


def test_while_the_reference_loads_the_policy_need_not_score_again(
    api: httpx.Client, fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = fake_ray.get

    def get_without_the_base(path: str) -> tuple[int, Any]:
        status, answer = get(path)
        if path.startswith("/api/serve"):
            told = answer["applications"]
            bases = {name for name in told if re.search(r"raydpo-\w+-tiny-\w+$", name)}
            answer = answer | {"applications": told | {name: served(None, status="DEPLOY_FAILED") for name in bases}}
        return status, answer

    row = [{"prompt": "the lazy", "completions": ["dog"]}]
    monkeypatch.setattr("services.control_plane.ray_api.VIEW_SECONDS", 0.0)
    monkeypatch.setattr("services.control_plane.inference.inference.VIEW_SECONDS", 0.0)
    wanted = answered(ask(api, "dpo", row, beta=1))
    ASKED.clear()
    with monkeypatch.context() as patch:
        patch.setattr(fake_ray, "get", get_without_the_base)
        assert "'tiny' could not be loaded" in refused(ask(api, "dpo", row, beta=1), 503)[1]
        assert ASKED == ["ft:tiny:raydpo::dpo"]
    while (answer := ask(api, "dpo", row, beta=1)).status_code == 503:
        pass  # the base is removed, and loaded again
    assert answered(answer) == wanted
    assert ASKED == ["ft:tiny:raydpo::dpo", "tiny"]
    assert answered(ask(api, "dpo", row, beta=1)) == wanted
    assert ASKED[2:] == ["ft:tiny:raydpo::dpo", "tiny"]


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more", "param", "said"),
    [
        ("tiny", {}, "beta", "'tiny' is a base model, which has no beta; give 'beta'."),
        (
            "tiny",
            {"beta": 1},
            "reference",
            "'tiny' is a base model, which has no reference; name a model in 'reference'.",
        ),
        ("simpo", {"beta": 1}, "reference", "was trained by simpo, whose rewards are no log-ratios"),
        ("simpo", {"reference": "tiny"}, "beta", "so its beta is not known; give 'beta'."),
        ("reward", {"beta": 1}, "beta", "is a reward model, which takes no beta; leave the field 'beta' out."),
        ("reward", {"reference": "tiny"}, "reference", "which takes no reference; leave the field 'reference' out."),
        (
            "dpo",
            {"reference": "ft:tiny:raydpo::reward"},
            "reference",
            "is a reward model; set the field 'reference' to a policy",
        ),
        ("dpo", {"reference": "other"}, "reference", "has another tokenizer than the policy"),
        ("dpo", {"beta": 0}, "beta", "greater than 0"),
        ("dpo", {"beta": 101}, "beta", "less than or equal to 100"),
        ("dpo", {"temperature": 1}, "temperature", "Unknown parameter"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    api: httpx.Client, name: str, more: dict[str, object], param: str, said: str
) -> None:
    found, message = refused(ask(api, name, ROWS[:1], **more))
    assert found == param
    assert said in message


def test_models_that_do_not_exist_are_named(api: httpx.Client) -> None:
    assert refused(ask(api, "none"), 404)[0] == "model"
    assert refused(ask(api, "dpo", reference="none"), 404)[0] == "reference"


@pytest.mark.parametrize(
    ("row", "param", "said"),
    [
        ({"prompt": "a"}, "rows.1.completions", "Missing required parameter"),
        ({"prompt": "a", "completions": ["b"], "chosen": "c"}, "rows.1.chosen", "Unknown parameter"),
        ({"prompt": "a", "completions": []}, "rows.1.completions", "at least one completion"),
        ({"prompt": [USER], "completions": [[USER]]}, "rows.1.completions.0.0", "must be an assistant message"),
        ({"prompt": [USER], "completions": ["b"]}, "rows.1.completions.0", "must be a list"),
        (
            {"prompt": "a", "completions": ["b"] * (MOST_COMPLETIONS + 1)},
            "rows.1.completions",
            "a row can have at most 64",
        ),
        (
            {"prompt": "x", "completions": ["y", "x" * MODEL_LENGTH]},
            "rows.1.completions.1",
            f"the model takes at most {MODEL_LENGTH}",
        ),
        (
            {"prompt": "a", "completions": ["b"], "tools": [TOOL]},
            "rows.1.tools",
            "only with a prompt that",
        ),
        (
            {"prompt": [SYSTEM, USER], "completions": [TURNS[:1] + TURNS[2:]]},
            "rows.1.completions.0.1",
            "comes before the tool",
        ),
        ({"prompt": [SYSTEM], "completions": [[said("b")]], "system": "c"}, "rows.1.system", "two system prompts"),
    ],
)
def test_a_wrong_row_is_refused_by_its_number_and_field(
    api: httpx.Client, row: dict[str, object], param: str, said: str
) -> None:
    found, message = refused(ask(api, "dpo", [ROWS[0], row]))
    assert found == param
    assert said in message


def test_a_request_has_rows_and_not_too_many(api: httpx.Client) -> None:
    assert refused(ask(api, "dpo", []))[0] == "rows"
    param, message = refused(ask(api, "dpo", [ROWS[0]] * (MOST_ROWS + 1)))
    assert (param, f"at most {MOST_ROWS}" in message) == ("rows", True)
