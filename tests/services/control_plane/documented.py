"""Compares the JSON that the service makes with the types that the OpenAPI document describes."""

import json
from typing import Any

from pydantic import TypeAdapter


def check(kind: Any, told: dict[str, Any]) -> None:
    """Fails unless the object has all fields of the type, with values of their types, and no others."""
    TypeAdapter(kind).validate_json(json.dumps(told), strict=True, extra="forbid")
