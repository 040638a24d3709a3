"""Tests how the OpenAPI document describes answers."""

from fastapi import FastAPI
from typing_extensions import TypedDict

from services.control_plane.core.documents import Page, answers
from services.control_plane.core.responses import listing


class Thing(TypedDict):
    id: str
    size: int


def test_a_route_s_answer_has_the_type_that_was_named_and_is_not_checked() -> None:
    app = FastAPI()

    @app.get("/things", responses=answers(Page[Thing]))
    async def things() -> dict[str, object]:
        return listing([], has_more=False)

    document = app.openapi()
    described = document["paths"]["/things"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    page = document["components"]["schemas"][described["$ref"].rsplit("/", 1)[-1]]
    assert set(page["required"]) == set(listing([], has_more=False))
    thing = document["components"]["schemas"][page["properties"]["data"]["items"]["$ref"].rsplit("/", 1)[-1]]
    assert {name: field["type"] for name, field in thing["properties"].items()} == {"id": "string", "size": "integer"}
