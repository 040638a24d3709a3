import json

import pytest

from tests.services.control_plane.conftest import api_of


@pytest.mark.slow
def test_votes_are_listed_made_a_file_and_deleted(raydpo, service):
    vote = {"prompt": [{"role": "user", "content": "Hi?"}], "completions": [{"completion": "Hi!", "model": "tiny"}]}
    with api_of(service.url.removesuffix("/v1"), (service.home / "api.key").read_text().strip()) as api:
        thumb, edit = (
            api.post("/x/feedback", json=vote | by).json()["id"] for by in ({"thumb": "up"}, {"edit": "Ho!"})
        )
    listed = [line.split("\t") for line in raydpo("feedback", "list").stdout.splitlines()]
    assert [line[:5] for line in listed if line[0] in (thumb, edit)] == [
        [edit, "edit", "pairs", "messages", "a person,tiny"],
        [thumb, "thumb", "unpaired", "messages", "tiny"],
    ]
    assert [each["id"] for each in json.loads(raydpo("feedback", "list", "--kind", "pairs", "--json").stdout)] == [edit]
    made = raydpo("feedback", "file", "pairs")
    assert made.stderr.endswith("1 votes\n")
    assert json.loads(raydpo("files", "content", made.stdout.strip()).stdout)["feedback"]["id"] == edit
    assert raydpo("feedback", "delete", thumb).stdout == f"deleted {thumb}\n"
    refused = raydpo("feedback", "file", "unpaired")
    assert (refused.exit_code, "has no feedback of the kind 'unpaired'" in refused.stderr) == (1, True)
