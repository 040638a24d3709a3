"""Writes the chart's README: every value of values.yaml with its caption.

python deploy/chart_readme.py > deploy/chart/README.md
"""

import json
import re
import sys
from pathlib import Path

import yaml

VALUES = Path(__file__).parent / "chart" / "values.yaml"

HEAD = """\
# The Helm chart of raydpo

The control plane, its migration and a Ray cluster.
How to install it is in [docs/operate/kubernetes.md](../../docs/operate/kubernetes.md).
This file is made from `values.yaml` by `deploy/chart_readme.py`.

| value | default | meaning |
|---|---|---|
"""


def captions(text: str) -> dict[str, str]:
    """The comment above each value of the first two levels, and of an item of a list, by dotted name.

    Raises ValueError for a value without a comment.
    """
    found, group, comment = {}, "", ""
    for line in text.splitlines():
        if match := re.match(r" *# (.*)", line):
            comment = f"{comment} {match[1]}".strip()
        elif match := re.match(r"(  - |    |  |)(\w+):", line):
            indent, key = match.groups()
            if indent == "":
                group, name = key, key
            elif indent == "  ":
                name = f"{group}.{key}"
            elif indent == "    " and f"{group}[].name" not in found:
                continue  # part of a value that has its caption
            else:
                name = f"{group}[].{key}"
            if not comment:
                raise ValueError(f"{name} has no caption in values.yaml; write one above it")
            found[name], comment = comment, ""
    return found


def readme(text: str) -> str:
    values = yaml.safe_load(text)
    lines = []
    for name, caption in captions(text).items():
        group, _, leaf = name.partition(".")
        is_item = group.endswith("[]")
        value = values[group.removesuffix("[]")]
        if leaf:
            value = (value[0] if is_item else value)[leaf]
        named = f"`{name}` | `{json.dumps(value)}`" if leaf or not value else f"**{name}** |"
        lines.append(f"| {named} | {caption} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(readme(VALUES.read_text()))
