"""Tests that public preference datasets can be uploaded as they are published."""

from typing import Any

import openai
import pytest

from tests.public_sets import PUBLIC_SETS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_a_public_set_is_uploaded_as_it_is_published(client: openai.OpenAI, name: str) -> None:
    public = PUBLIC_SETS[name]
    said = {"x_raydpo": public.extension} if public.extension else {}
    stored = client.files.create(file=("rows.jsonl", public.lines), purpose="fine-tune", extra_body=said)
    told: Any = stored.model_dump()["x_raydpo"]["report"]
    assert (stored.status, told["kind"], told["problems"]) == ("processed", public.kind, [])
    assert (told["num_rows"], told["num_groups"]) == (len(public.rows), public.num_groups)
