"""Tests the routes that share models."""

import threading
from urllib.parse import quote

import httpx
import openai
import pytest

from tests.services.control_plane.conftest import API_KEY
from tests.services.control_plane.models import test_sharing as sharing_tests
from tests.services.control_plane.models.test_sharing import PLAIN, SLASHED, permissions

projects, owner = sharing_tests.projects, sharing_tests.owner  # fixtures


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_pages_neither_repeat_nor_loop_while_permissions_come(owner: openai.OpenAI, order: str) -> None:
    there = [permissions(owner).create(PLAIN, project_ids=[f"proj_{n}"]).data[0].id for n in range(12)]
    done = threading.Event()

    def write() -> None:
        for number in range(12, 30):
            permissions(owner).create(PLAIN, project_ids=[f"proj_{number}"])
            if done.wait(0.02):
                return

    writer = threading.Thread(target=write)
    writer.start()
    seen = [permission.id for permission in permissions(owner).list(PLAIN, limit=3, order=order)]
    done.set()
    writer.join()
    assert len(set(seen)) == len(seen)
    assert [name for name in seen if name in there] == (there if order == "ascending" else there[::-1])


@pytest.mark.parametrize("model", [PLAIN, SLASHED])
def test_slashes_and_colons_in_names_come_raw_or_encoded(owner: openai.OpenAI, base_url: str, model: str) -> None:
    (granted,) = permissions(owner).create(model, project_ids=["proj_other"])
    with httpx.Client(base_url=f"{base_url}/v1/fine_tuning", headers={"Authorization": f"Bearer {API_KEY}"}) as http:
        for name in (model, quote(model, safe=":"), quote(model, safe="")):
            url = f"/checkpoints/{name}/permissions"
            assert [row["id"] for row in http.get(url).json()["data"]] == [granted.id]
            again = http.post(url, json={"project_ids": ["proj_other"]}).json()
            assert (again["first_id"], again["last_id"], again["has_more"]) == (granted.id, granted.id, False)
        assert http.delete(f"/checkpoints/{quote(model, safe='')}/permissions/{granted.id}").json()["deleted"]
