"""Tests the routes that score texts and token ids against dpo_core's own scorer.

The trainer's forward pass takes the place of the engine.
"""

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from transformers import PreTrainedModel

from dpo_core.data.groups import Group
from dpo_core.encoding.encode import EncodedGroup, encode_group, encode_groups
from dpo_core.models.model import load_policy, load_tokenizer
from dpo_core.policy.scorer import score_reference
from services import storage
from services.contract import Scored
from services.serving import scoring
from services.serving.scoring import Scoring
from tests.services.s3 import S3
from tests.services.serving.conftest import MODEL_LENGTH, make_model

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}</s>{% endif %}{% if day %}{{ strftime_now('%d %b') }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER, SYSTEM = {"role": "user", "content": "the quick fox?"}, {"role": "system", "content": "be quick."}
TOOL = {"type": "function", "function": {"name": "jump", "parameters": {"type": "object", "properties": {"n": {}}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "jump", "arguments": {"n": 3}}}


def said(text: str, role: str = "assistant", **more: object) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


TURNS = [said("", tool_calls=[CALL]), said("over the dog", "tool", tool_call_id="1"), said("the fox is over the dog")]
ROWS: list[dict[str, Any]] = [
    {"prompt": "the quick brown", "completions": ["fox", " dog jumps over", ""]},
    {"prompt": [SYSTEM, USER], "completions": [[said("jumps")], [said("lazy dog")]]},
    {"prompt": [USER], "completions": [TURNS, [said("no")]], "tools": [TOOL]},
    {"prompt": [USER, said("what?"), USER], "completions": [[said("fox"), said("which?", "user"), said("brown fox")]]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), TEMPLATE)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return load_policy(folder)


@pytest.fixture(scope="module")
def app(folder: Path, model: PreTrainedModel) -> FastAPI:
    async def score(groups: Sequence[EncodedGroup]) -> list[list[list[float]]]:
        scored = score_reference(model, groups, max_tokens_per_pack=512)
        return [[[logp] for logp in group.ref_logps or ()] for group in scored]

    app = FastAPI()
    Scoring(str(folder), MODEL_LENGTH, score).add_to(app)
    return app


def post(app: FastAPI, path: str, body: object) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://model") as client:
            return await client.post(f"/v1/score/{path}", json=body)

    return asyncio.run(send())


def scored(app: FastAPI, path: str, body: object) -> Scored:
    answer = post(app, path, body)
    assert answer.status_code == 200, answer.text
    return Scored.model_validate_json(answer.content)


def refused(answer: httpx.Response, status: int = 400) -> tuple[str, str]:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"], answer.json()["error"]["param"]


def groups_of(rows: Sequence[dict[str, Any]]) -> list[Group]:
    return [Group(row["prompt"], tuple(row["completions"]), i, tools=row.get("tools")) for i, row in enumerate(rows, 1)]


def test_texts_are_encoded_and_scored_as_in_training(app: FastAPI, folder: Path, model: PreTrainedModel) -> None:
    tokenizer = load_tokenizer(folder)
    encoded = [encode_group(group, tokenizer) for group in groups_of(ROWS)]
    found = scored(app, "texts", {"groups": ROWS})
    assert [(group.prompt_ids, group.completion_ids, group.others) for group in found.groups] == [
        (list(group.prompt_ids), tuple(map(list, group.completion_ids)), group.others) for group in encoded
    ]
    assert found.num_tokens == [group.num_learned for group in encoded]
    assert found.num_tokens[2][0] < len(found.groups[2].completion_ids[0])  # what the tool said is not scored
    wanted = score_reference(model, encoded, max_tokens_per_pack=10_000)
    for outputs, group in zip(found.outputs, wanted, strict=True):
        assert [logp for (logp,) in outputs] == pytest.approx(group.ref_logps, abs=1e-4, rel=0)


@pytest.mark.slow
def test_a_tokenizer_whose_copy_is_gone_is_fetched_again(
    folder: Path, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def score(groups: Sequence[EncodedGroup]) -> list[list[list[float]]]:
        return [[[0.0] for _ in group.completion_ids] for group in groups]

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = storage.join(s3.new_folder(), "model")
    storage.publish(folder, source)
    copy = storage.fetch(source)
    app = FastAPI()
    Scoring(source, MODEL_LENGTH, score).add_to(app)
    shutil.rmtree(copy.parent)
    s3.proxy.refusing = True
    s3.proxy.cut()
    answer = post(app, "texts", {"groups": ROWS})
    assert (answer.status_code, "does not answer" in answer.text) == (503, True)
    s3.proxy.pass_on()
    assert scored(app, "texts", {"groups": ROWS}).vocabulary


def test_a_second_model_scores_the_same_ids(app: FastAPI) -> None:
    first = scored(app, "texts", {"groups": ROWS})
    tokens = {"groups": [group.model_dump(mode="json") for group in first.groups], "vocabulary": first.vocabulary}
    assert scored(app, "tokens", tokens) == first


def test_a_date_in_the_template_is_the_given_one(app: FastAPI, folder: Path) -> None:
    row = {"prompt": [USER], "completions": [[said("fox")]], "template_arguments": {"day": True}}
    group = Group([USER], ([said("fox")],), 1, template_arguments={"day": True})
    (encoded,) = encode_groups([group], load_tokenizer(folder), today=date(2020, 2, 29))
    assert isinstance(encoded, EncodedGroup)
    (found,) = scored(app, "texts", {"groups": [row], "today": "2020-02-29"}).groups
    assert found.prompt_ids == encoded.prompt_ids
    assert found != scored(app, "texts", {"groups": [row]}).groups[0]


def test_what_the_template_leaves_out_is_refused_by_its_row(tmp_path: Path) -> None:
    app = FastAPI()
    Scoring(str(make_model(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")), 99, None).add_to(app)  # type: ignore[arg-type]
    message, param = refused(post(app, "texts", {"groups": [ROWS[1], ROWS[2]]}))
    assert param == "rows.1"
    assert message.startswith("rows.1: the chat template leaves out the tool 'jump'")


def test_messages_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    app = FastAPI()
    Scoring(str(make_model(tmp_path, None)), 99, None).add_to(app)  # type: ignore[arg-type]
    message, param = refused(post(app, "texts", {"groups": ROWS[1:2]}))
    assert param == "rows"
    assert message.startswith("The tokenizer has no chat template")


def test_a_row_that_is_too_long_is_refused_by_its_completion(app: FastAPI) -> None:
    row = {"prompt": "x", "completions": ["y", "x" * MODEL_LENGTH]}
    message, param = refused(post(app, "texts", {"groups": [ROWS[0], row]}))
    length = MODEL_LENGTH + len(["x", "</s>"])
    assert param == "rows.1.completions.1"
    assert (
        message
        == f"{param} and its prompt have {length} tokens, but the model takes at most {MODEL_LENGTH}; shorten them."
    )


def test_too_many_tokens_are_refused_with_their_number(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    found = scored(app, "texts", {"groups": ROWS})
    lengths = [len(group.prompt_ids) + len(ids) for group in found.groups for ids in group.completion_ids]
    monkeypatch.setattr(scoring, "MOST_TOKENS", sum(lengths))
    scored(app, "texts", {"groups": ROWS})
    monkeypatch.setattr(scoring, "MOST_TOKENS", sum(lengths) - 1)
    message, _ = refused(post(app, "texts", {"groups": ROWS}), 413)
    assert (
        message
        == f"The rows have {sum(lengths)} tokens, but a request can have at most {sum(lengths) - 1}; send fewer rows."
    )


def test_ids_of_another_vocabulary_are_refused(app: FastAPI) -> None:
    message, param = refused(post(app, "tokens", {"groups": [], "vocabulary": "0" * 64}))
    assert (param, "has another tokenizer than the policy" in message) == ("reference", True)


def test_an_engine_that_died_is_a_503(folder: Path) -> None:
    async def score(groups: Sequence[EncodedGroup]) -> list[list[list[float]]]:
        raise ConnectionError("The engine has died.")

    app = FastAPI()
    Scoring(str(folder), MODEL_LENGTH, score).add_to(app)
    assert post(app, "texts", {"groups": ROWS}).status_code == 503
