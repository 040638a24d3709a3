"""Tests which jobs are admitted, by their files and where these lie."""

from typing import Any

import openai
import pytest

from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import pairs
from tests.services.control_plane.jobs.test_api import create, create_at, upload


def test_too_few_examples_are_refused_with_both_numbers(client: openai.OpenAI) -> None:
    file = client.files.create(file=("few.jsonl", pairs(3)), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match=r"has 3 example\(s\), but must have at least 10"):
        create(client, file.id)


@pytest.mark.parametrize(
    ("row", "takes", "refuses"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}, "dpo", "simpo"),
        ({"prompt": "a", "completions": ["b", "c", "d"], "ranks": [1, 2, 2]}, "lipo", "ipo"),
        ({"prompt": "a", "completion": "b", "label": True}, "bco", "dpo"),
    ],
    ids=["margins", "rankings", "unpaired"],
)
def test_a_file_is_for_the_objectives_that_learn_from_what_it_holds(
    client: openai.OpenAI, row: dict[str, Any], takes: str, refuses: str
) -> None:
    file_id = upload(client, row)
    client.fine_tuning.jobs.cancel(create(client, file_id, method={"type": takes}).id)
    with pytest.raises(openai.BadRequestError, match=f"{file_id} (holds|has) .* method '{refuses}'") as refused:
        create(client, file_id, method={"type": refuses})
    assert refused.value.code == "invalid_training_file"


@pytest.mark.parametrize(
    "row",
    [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}],
    ids=["another kind", "margins"],
)
def test_a_validation_file_holds_what_the_objective_learns_from(
    client: openai.OpenAI, training_file: str, row: dict[str, Any]
) -> None:
    file_id = upload(client, row)
    with pytest.raises(openai.BadRequestError, match=f"{file_id} (holds|has) .* method 'ipo'") as refused:
        create(client, training_file, method={"type": "ipo"}, validation_file=file_id)
    assert (refused.value.param, refused.value.code) == ("validation_file", "invalid_validation_file")


def test_a_local_file_must_be_admitted_and_be_there(client: openai.OpenAI, settings: Settings) -> None:
    data = settings.home / "data"
    data.mkdir()
    (data / "rows.jsonl").write_bytes(pairs())
    (data / "link.jsonl").symlink_to(settings.home / "secret.jsonl")
    (settings.home / "secret.jsonl").write_bytes(pairs())
    client.fine_tuning.jobs.cancel(create_at(client, f"{data.as_uri()}/rows.jsonl").id)
    client.fine_tuning.jobs.cancel(create_at(client, f"{data.as_uri()}/*.jsonl").id)
    for name, message in [
        ("missing.jsonl", "is not a file"),
        ("../secret.jsonl", "is not allowed"),
        ("%2e%2e/secret.jsonl", "is not allowed"),
        ("link.jsonl", "is not allowed"),
    ]:
        with pytest.raises(openai.BadRequestError, match=message) as refused:
            create_at(client, f"{data.as_uri()}/{name}")
        assert (refused.value.param, refused.value.code) == ("x_raydpo.dataset", "invalid_training_file")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://bucket/other.jsonl", "the setting dataset_uris allows https://, hf://datasets/, s3://bucket/rows/"),
        ("s3://bucket/rows/a.jsonl?endpoint_override=127.0.0.1:1", "is not allowed"),
        ("gs://bucket/a.jsonl", "is not allowed"),
        ("file:///etc/passwd", "is not allowed"),
        ("http://example.com/rows.jsonl", "is not allowed"),
        ("https://user:secret@example.com/rows.jsonl", "contains credentials"),
        ("https://example.com/rows/", "names a folder"),
        ("https://127.0.0.1/rows.jsonl", "not public"),
        ("https://2130706433/rows.jsonl", "not public"),
        ("https://0x7f.1/rows.jsonl", "not public"),
        ("https://0177.0.0.1/rows.jsonl", "not public"),
        ("https://[::ffff:10.0.0.1]/rows.jsonl", "not public"),
        ("https://[2002:a00:1::]/rows.jsonl", "not public"),
        ("https://169.254.169.254/latest/meta-data", "not public"),
    ],
)
def test_a_uri_that_may_not_be_read_is_refused_at_the_door(client: openai.OpenAI, uri: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create_at(client, uri)
    assert (refused.value.param, refused.value.code) == ("x_raydpo.dataset", "invalid_training_file")
    assert message in refused.value.message
    assert "secret" not in refused.value.message
