"""Tests what every route asks for before it begins."""

import httpx
import openai
import pytest

from tests.services.control_plane.conftest import API_KEY


def test_headers_that_name_another_organization_or_project_are_refused(base_url: str) -> None:
    def ask(**named: str) -> None:
        with openai.OpenAI(base_url=f"{base_url}/v1", api_key=API_KEY, max_retries=0, **named) as client:
            client.files.list()

    ask(organization="raydpo", project="proj_default")
    for named in ({"organization": "other"}, {"project": "proj_other"}):
        with pytest.raises(openai.AuthenticationError) as refused:
            ask(**named)
        assert refused.value.code == f"mismatched_{next(iter(named))}"


@pytest.mark.parametrize(("path", "named"), [("/files?a=1", "a"), ("/fine_tuning/jobs?metadata[a]=b&sort=asc", "sort")])
def test_a_query_parameter_that_the_route_does_not_read_is_refused_by_name(
    api: httpx.Client, path: str, named: str
) -> None:
    error = api.get(path).json()["error"]
    assert (error["param"], error["code"]) == (named, "unknown_parameter")


def test_a_request_without_a_key_is_told_where_to_send_it(base_url: str) -> None:
    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Basic abc"}):
        answer = httpx.get(f"{base_url}/v1/files", headers=headers, trust_env=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert "Authorization: Bearer" in answer.text
