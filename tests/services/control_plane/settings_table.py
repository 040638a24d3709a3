"""Prints the table of settings in docs/operate/settings.md:

python -m tests.services.control_plane.settings_table
"""

import json
import sys
from pathlib import Path

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from services.control_plane.settings import Settings


def table() -> str:
    lines = [_line(name, field) for name, field in Settings.model_fields.items()]
    return "\n".join(["| setting | environment | default | meaning |", "|---|---|---|---|", *lines])


def _line(name: str, field: FieldInfo) -> str:
    variable = field.validation_alias or f"RAYDPO_{name.upper()}"
    return f"| `{name}` | `{variable}` | {_default(field)} | {field.description} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    assert not isinstance(value, SecretStr)
    if value is None:
        return ""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    return f"`{value if isinstance(value, str | Path) else json.dumps(value)}`"


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
