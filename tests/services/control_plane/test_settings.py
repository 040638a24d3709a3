"""Tests what the documents say about each setting."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services.control_plane.settings import Settings
from tests.services.control_plane.settings_table import table

PAGE = Path(__file__).parents[3] / "docs" / "operate" / "settings.md"


def test_every_setting_is_explained() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_secrets_are_set_by_these_variables() -> None:
    of_one = {"RAYDPO_API_KEY", "RAYDPO_RAY_TOKEN", "RAYDPO_OIDC_CLIENT_SECRET"}
    assert Settings.secret_variables() == {"DATABASE_URL", "DATABASE_DIRECT_URL", "RAYDPO_JUDGES", *of_one}


GIVEN = dict.fromkeys(("database_url", "storage_url", "api_key", "advertised_url", "ray_url"), "x")
JUDGE = {"url": "https://host/v1", "model": "gpt-9", "api_key": "sk-secret"}


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        ({"url": "ftp://host/v1"}, "must be the base URL of an OpenAI-compatible API"),
        ({"url": "https://me:sk-secret@host/v1"}, "without credentials and query"),
        ({"url": "https://host/v1?key=sk-secret"}, "put a key into api_key"),
        ({"url": "https://host:x/v1"}, "a port that is not a number"),
        ({"api_key": "sk-secret\n"}, "without spaces and line ends"),
        ({"api_key": ["sk-secret"]}, "judges.j.api_key"),
        ({"apikey": "sk-secret"}, "judges.j.apikey"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_without_telling_its_key(judge: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings(**GIVEN, judges={"j": JUDGE | judge})
    assert told in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_judge_has_a_name_that_no_model_has() -> None:
    with pytest.raises(ValidationError, match="judges and models both have the name 'j'; rename the judge"):
        Settings(**GIVEN, judges={"j": JUDGE}, models={"j": "/j"})


def test_a_judges_key_can_be_in_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "raydpo.toml"
    file.write_text('[judges.j]\nurl = "https://host/v1/chat/completions"\nmodel = "gpt-9"\n')
    monkeypatch.setenv("RAYDPO_SETTINGS_FILE", str(file))
    monkeypatch.setenv("RAYDPO_JUDGES", json.dumps({"j": {"api_key": "sk-secret"}}))
    judge = Settings(**GIVEN).judges["j"]
    assert judge.api_key is not None
    assert (judge.url, judge.model, judge.api_key.get_secret_value()) == ("https://host/v1", "gpt-9", "sk-secret")
    assert "sk-secret" not in Settings(**GIVEN).model_dump_json()


def test_the_page_has_the_table_of_settings() -> None:
    assert table() in PAGE.read_text(), "Put in what `python -m tests.services.control_plane.settings_table` prints."
