"""Tests what the documents say about each setting."""

from pathlib import Path

from services.control_plane.settings import Settings
from tests.services.control_plane.settings_table import table

PAGE = Path(__file__).parents[3] / "docs" / "operate" / "settings.md"


def test_every_setting_is_explained() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_secrets_are_set_by_these_variables() -> None:
    wanted = {"DATABASE_URL", "DATABASE_DIRECT_URL", "RAYDPO_API_KEY", "RAYDPO_RAY_TOKEN", "RAYDPO_OIDC_CLIENT_SECRET"}
    assert Settings.secret_variables() == wanted


def test_the_page_has_the_table_of_settings() -> None:
    assert table() in PAGE.read_text(), "Put in what `python -m tests.services.control_plane.settings_table` prints."
