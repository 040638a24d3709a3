"""Tests /v1/x/datasets/{id}/rows, which shows rows of uploaded files."""

import gzip
import json
from typing import Any

import httpx
import pytest

from services.control_plane.files import rows
from tests.services.control_plane.conftest import pair, pairs

DROP = {"x_raydpo[invalid_rows]": "drop", "x_raydpo[max_invalid_share]": "0.5"}


def upload(api: httpx.Client, content: bytes, **options: str) -> str:
    answer = api.post("/files", files={"file": ("rows", content)}, data={"purpose": "fine-tune"} | options)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def read(api: httpx.Client, file_id: str, **query: int) -> Any:
    answer = api.get(f"/x/datasets/{file_id}/rows", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("content", [pairs(30), gzip.compress(pairs(30))], ids=["plain", "gzip"])
def test_pages_hold_every_row_once(api: httpx.Client, content: bytes) -> None:
    file_id, lines, first = upload(api, content), [], 1
    while first is not None:
        page = read(api, file_id, **{"from": first}, limit=7)
        lines += [row["line"] for row in page["data"]]
        first = page["next"]
        assert page["has_more"] == (first is not None)
    assert lines == list(range(1, 31))
    (group,) = read(api, file_id, **{"from": 12}, limit=1)["data"][0]["groups"]
    assert group["prompt"] == [{"role": "user", "content": "What is 11 plus 1?"}]
    assert [each[0]["content"] for each in group["completions"]] == ["It is 12.", "No idea."]


def test_a_page_begins_behind_blank_lines_and_the_byte_order_mark(api: httpx.Client) -> None:
    file_id = upload(api, b"\xef\xbb\xbf" + pair(1) + b"\n\n\n" + pairs(12))
    assert [row["line"] for row in read(api, file_id, **{"from": 2}, limit=2)["data"]] == [4, 5]


def test_a_row_that_cannot_be_used_has_a_problem_and_no_groups(api: httpx.Client) -> None:
    half_a_character = json.dumps({"prompt": "a", "chosen": "\ud800", "rejected": "b"}).encode()
    other_format = json.dumps({"prompt": "a", "completion": "b", "label": True}).encode()
    file_id = upload(api, b"\n".join([pair(0), other_format, half_a_character, pairs(12)]), **DROP)
    found = read(api, file_id, **{"from": 2}, limit=3)["data"]
    assert [row["problem"] and row["problem"]["code"] for row in found][::2] == ["mixed_formats", None]
    assert found[1]["problem"]["message"].startswith("Line 3: ")
    assert [len(row["groups"]) for row in found] == [0, 0, 1]


def test_rows_of_one_group_stay_together_wherever_the_page_begins(api: httpx.Client) -> None:
    answers = [{"prompt": f"p{i // 3}", "response": f"r{i}", "helpfulness": i % 3} for i in range(36)]
    file_id = upload(api, b"\n".join(json.dumps(row).encode() for row in answers))
    page = read(api, file_id, **{"from": 3}, limit=4)["data"]
    assert [len(row["groups"]) for row in page] == [0, 1, 0, 0]
    assert [each[0]["content"] for each in page[1]["groups"][0]["completions"]] == ["r5", "r4", "r3"]
    assert all(row["problem"] is None for row in page)


def test_a_page_ends_early_if_its_rows_are_large(api: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_BYTES", 1000)
    large = json.dumps({"prompt": "a", "chosen": "b" * 5000, "rejected": "c"}).encode()
    file_id = upload(api, b"\n".join([large] * 12))
    assert read(api, file_id) == read(api, file_id, limit=1)


def test_a_file_of_another_project_is_not_there(api: httpx.Client) -> None:
    assert api.get("/x/datasets/file-none/rows").json()["error"]["code"] == "file_not_found"
