"""Tests every cell of the tables of combinations in the documents, with a request to the service. There is no
cluster."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from dpo_core.methods import METHODS
from dpo_core.options import OBJECTIVES
from services.control_plane.jobs.combinations import RULES
from services.control_plane.settings import BaseModel, Settings
from tests.public_sets import PUBLIC_SETS, PublicSet
from tests.services.control_plane.jobs.combinations_table import (
    CHOICES,
    KINDS,
    MODELS,
    PAGE,
    PAIRS,
    body_of,
    broken,
    page,
    plain_settings,
)
from tests.services.headers import SMALL, write_model

SETTINGS = plain_settings()
CELLS = {pair: broken(body_of(*(CHOICES[each] for each in pair)), SETTINGS) for pair in PAIRS}


@pytest.fixture(scope="module")
def settings(offline: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Returns settings with a second base model: a mixture of experts, whose weights can be read."""
    mixture = write_model(tmp_path_factory.mktemp("models") / "mixture", SMALL, experts=1, model_type="mixtral")
    return offline.model_copy(update={"models": offline.models | {"mixture": BaseModel(source=str(mixture))}})


def upload(client: openai.OpenAI, rows: bytes) -> str:
    return client.files.create(file=("rows.jsonl", rows), purpose="fine-tune").id


@pytest.fixture(scope="module")
def files(client: openai.OpenAI) -> dict[str, str]:
    """Uploads a file of each kind of rows, and one with margins, and returns their ids."""
    rows = {each.kind: each.lines for each in PUBLIC_SETS.values() if not each.extension}
    spoken = [{"messages": row["messages"]} for row in PUBLIC_SETS["LLaMA-Factory, KTO"].rows]
    rows["demonstrations"] = PublicSet("demonstrations", "supervised", spoken).lines
    assert rows.keys() == set(KINDS)
    led = [{"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No.", "margin": 0.5} for n in range(12)]
    rows["margins"] = PublicSet("pairs", "dpo", led).lines
    return {
        kind: client.files.create(file=("rows.jsonl", lines), purpose="fine-tune").id for kind, lines in rows.items()
    }


@pytest.fixture(scope="module")
def held_out(client: openai.OpenAI, files: dict[str, str]) -> dict[str, str]:
    """Uploads the same rows as other files, and returns their ids."""
    return {kind: upload(client, client.files.content(name).content) for kind, name in files.items()}


@pytest.fixture(scope="module")
def answer(api: httpx.Client, insert_models: Any, files: dict[str, str], held_out: dict[str, str]) -> Iterator[Any]:
    insert_models(*(model for model in MODELS.values() if model.job_id is not None))

    def ask(body: dict[str, Any]) -> httpx.Response:
        kind = OBJECTIVES[body["method"]["type"]]().traits.learns_from[0]
        named = {"training_file": files[kind]} | (
            {"validation_file": held_out[kind]} if "validation_file" in body else {}
        )
        return api.post("/x/jobs/validate", json=body | named)

    return ask


@pytest.mark.parametrize("row", {row for row, _ in PAIRS}, ids=lambda row: CHOICES[row].words)
def test_the_service_answers_as_each_cell_says(answer: Any, row: int) -> None:
    for column in (column for first, column in PAIRS if first == row):
        found, number = answer(body_of(CHOICES[row], CHOICES[column])), CELLS[row, column]
        cell = (CHOICES[column].words, found.text)
        if number is None:
            assert found.status_code == 200, cell
            continue
        rule, error = RULES[number], found.json()["error"]
        assert (found.status_code, error["param"], error["code"]) == (400, rule.param, "invalid_value"), cell
        assert error["message"].startswith(f"A job cannot have {rule.what} ("), cell
        assert error["message"].endswith(f"; {rule.remedy}."), cell


def test_every_rule_is_in_a_cell() -> None:
    assert {number for number in CELLS.values() if number is not None} == set(range(len(RULES)))


@pytest.mark.parametrize("method", METHODS)
def test_an_objective_takes_the_data_that_its_row_says(api: httpx.Client, files: dict[str, str], method: str) -> None:
    traits = OBJECTIVES[method]().traits
    for kind, name in files.items():
        learns = traits.takes_margins if kind == "margins" else kind in traits.learns_from
        found = api.post("/x/jobs/validate", json={"model": "tiny", "training_file": name, "method": {"type": method}})
        if learns:
            assert found.status_code == 200, (kind, found.text)
            continue
        assert found.status_code == 400, kind
        error = found.json()["error"]
        assert (error["param"], error["code"]) == ("training_file", "invalid_training_file")
        assert "Choose another method" in error["message"] or "remove them, or use dpo." in error["message"]


def test_the_page_has_the_tables() -> None:
    printed = page(SETTINGS)
    assert PAGE.read_text() == printed, "Print it: python -m tests.services.control_plane.jobs.combinations_table"
