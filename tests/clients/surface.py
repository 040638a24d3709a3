"""Extracts OpenAI's API as data from OpenAI's public documents:

    python tests/clients/surface.py openapi.json > tests/clients/surface.json

`openapi.json` is OpenAI's OpenAPI document; webhooks and graders, which it lacks, come from the `openai` client.
"""

import json
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
from openai.types import webhooks
from openai.types.webhooks import (
    webhook_create_params,
    webhook_list_params,
    webhook_rotate_secret_params,
    webhook_test_params,
    webhook_update_params,
)

SOURCE = "github.com/openai/openai-openapi (MIT), commit f85dbe2 of 2026-08-21"
PREFIXES = ("/files", "/uploads", "/fine_tuning", "/models", "/completions", "/chat")
BY_FORWARDING = ("/completions", "/chat")  # their fields are vLLM's

Fields = dict[str, list[str]]  # dotted name: the texts it may be, if they are listed


def operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if not path.startswith(PREFIXES):
                continue
            fields = {} if path.startswith(BY_FORWARDING) else _request(document, operation)
            answer = [] if path.startswith(BY_FORWARDING) else _answer(document, operation)
            yield {"method": method.upper(), "path": path, "fields": fields, "answer": answer}


def _request(document: dict[str, Any], operation: dict[str, Any]) -> Fields:
    found: Fields = {}
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "query":
            found[parameter["name"]] = _texts(document, parameter["schema"])
    if body := operation.get("requestBody"):
        found |= _fields(document, _schema(body))
    return found


def _answer(document: dict[str, Any], operation: dict[str, Any]) -> list[str]:
    """Returns the keys of the operation's response, and for lists those of an item."""
    names = _fields(document, _schema(operation["responses"]["200"]))
    return list(dict.fromkeys(".".join(name.split(".")[: 1 + name.startswith("data.")]) for name in names))


def _schema(holder: dict[str, Any]) -> dict[str, Any]:
    (content,) = holder["content"].values()
    return typing.cast(dict[str, Any], content["schema"])


def _fields(document: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> Fields:
    """Returns the innermost fields of an object by their dotted names. For an array, these are the fields of an
    item."""
    schema = _resolved(document, schema)
    if schema.get("type") == "array":
        schema = _resolved(document, schema["items"])
    found: Fields = {}
    for name, part in schema.get("properties", {}).items():
        below = _fields(document, part, f"{prefix}{name}.")
        found |= below or {f"{prefix}{name}": _texts(document, part)}
    return found


def _resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Follows references, and if one of several types is possible, returns the only one that is an object or array."""
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    kinds = [_resolved(document, kind) for word in ("anyOf", "oneOf", "allOf") for kind in schema.get(word, [])]
    objects = [kind for kind in kinds if "properties" in kind or kind.get("type") == "array"]
    return objects[0] if len(objects) == 1 and "properties" not in schema else schema


def _texts(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    schema = _resolved(document, schema)
    return list(schema.get("items", schema).get("enum", []))


def client_operations() -> Iterator[dict[str, Any]]:
    for action in ("run", "validate"):
        yield {"method": "POST", "path": f"/fine_tuning/alpha/graders/{action}", "fields": {}, "answer": []}
    one, many = webhooks.WebhookEndpoint, "/webhook_endpoints"
    it, secret = f"{many}/{{webhook_endpoint_id}}", webhooks.WebhookEndpointWithSecret
    listed = [*(f"data.{name}" for name in one.model_fields), "object", "first_id", "last_id", "has_more"]
    rows: list[tuple[str, str, Any, Any]] = [
        ("GET", "/webhook_event_types", None, webhooks.WebhookEventTypeList),
        ("POST", many, webhook_create_params.WebhookCreateParams, secret),
        ("GET", many, webhook_list_params.WebhookListParams, listed),
        ("GET", it, None, one),
        ("POST", it, webhook_update_params.WebhookUpdateParams, one),
        ("DELETE", it, None, webhooks.DeletedWebhookEndpoint),
        ("POST", f"{it}/rotate_secret", webhook_rotate_secret_params.WebhookRotateSecretParams, secret),
        ("POST", f"{it}/test", webhook_test_params.WebhookTestParams, webhooks.WebhookEndpointTestResult),
    ]
    for method, path, params, answer in rows:
        names = answer if isinstance(answer, list) else list(answer.model_fields)
        yield {"method": method, "path": path, "fields": _params(params), "answer": names}


def _params(params: Any) -> Fields:
    if params is None:
        return {}
    return {name: _literals(hint) for name, hint in typing.get_type_hints(params).items()}


def _literals(hint: Any) -> list[str]:
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [text for part in typing.get_args(hint) for text in _literals(part)]


def main(path: Path) -> None:
    document = json.loads(path.read_text())
    found = [*operations(document), *client_operations()]
    sources = [
        "OpenAI's OpenAPI document, " + SOURCE,
        f"for webhooks and graders the `openai` client {openai.__version__}",
    ]
    rows = ",\n".join("  " + json.dumps(operation) for operation in found)
    print(f'{{\n "sources": {json.dumps(sources)},\n "operations": [\n{rows}\n ]\n}}')


if __name__ == "__main__":
    main(Path(sys.argv[1]))
