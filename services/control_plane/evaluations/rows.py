"""Reads the rows (prompts with completions) of an evaluation from a request or a file, and turns them into JSON and
back.
"""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import anyio.to_thread

from dpo_core.data.feedback import read_records
from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow
from dpo_core.data.messages import Text
from dpo_core.data.scored_formats import in_request, read_in_request
from services import storage
from services.containers import json_lines
from services.contract import Reading
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.store import ProjectStore
from services.control_plane.core.tables import reading_of
from services.control_plane.evaluations.requests import EvaluationRow, Judge
from services.control_plane.files import files

MOST_BYTES = 16 * 2**20  # of all rows of an evaluation, as JSON
SHOWN = ("prompt", "completions", "ratings", "tools", "template_arguments", "line")


async def read(
    store: ProjectStore,
    rows: Sequence[EvaluationRow] | None,
    file_id: str | None,
    most: int,
    *,
    only_labelled: bool = False,
) -> list[Group]:
    """Returns groups (prompts with their completions): the rows `rows` of a request or, if `rows` is None, the first
    `most` rows of the project's file with the id `file_id`.

    If `only_labelled` is true, leaves out rows of the file in which people prefer no completion. Raises InvalidRequest
    if there is no row that can be used.
    """
    if rows is not None:
        return read_request(rows)
    assert file_id is not None
    async with store.begin() as session:
        file = await files.find_checked(session, file_id, param="file")
    read_rows = partial(read_file, file.uri, reading_of(file), most, only_labelled=only_labelled)
    groups = await anyio.to_thread.run_sync(read_rows)
    if not groups:
        what = ", because none says which completion is better" if only_labelled else ""
        raise InvalidRequest(f"No row of the file {file_id} can be used{what}; name another file.", param="file")
    return groups


def check_expected(groups: Sequence[Group], judge: Judge, param: str) -> None:
    """Raises InvalidRequest if the judge is the rule `exact`, which compares answers with the best completion of their
    row, and a row in `groups` has no completion.

    `param` is the request's field that holds the rows.
    """
    for group in groups:
        if judge.type == "exact" and not group.completions:
            message = f"Row {group.line} has no completion for the rule 'exact' to compare answers with; add one."
            raise InvalidRequest(message, param=param)


def read_request(rows: Sequence[EvaluationRow]) -> list[Group]:
    """Returns the rows of a request as groups, which are prompts with their completions. A group may have no
    completions.

    Raises InvalidRequest, with the path of the value, for a row that cannot be read.
    """
    try:
        return [_read(number, row) for number, row in enumerate(rows, 1)]
    except InvalidRow as error:
        path, message = in_request(error)
        raise InvalidRequest(message, param=path) from None


def _read(number: int, row: EvaluationRow) -> Group:
    given = row.model_dump(exclude_none=True)
    if "completions" in given:
        return read_in_request(number, given)
    # The reader wants a completion; an empty one is read and left out again.
    is_chat = isinstance(row.prompt, list) or row.system is not None
    empty = [{"role": "assistant", "content": ""}] if is_chat and isinstance(row.prompt, list) else ""
    group = read_in_request(number, {**given, "completions": [empty]})
    return Group(group.prompt, (), group.line, tools=group.tools, template_arguments=group.template_arguments)


def read_file(uri: str, reading: Reading, most: int, *, only_labelled: bool) -> list[Group]:
    """Returns the first `most` groups (prompts with their completions) of a file whose rows were checked.

    `reading` holds the options for reading the rows. Leaves out invalid rows. If `only_labelled` is true, also leaves
    out groups in which people prefer no completion.
    """
    groups: list[Group] = []
    with storage.open_input(uri) as source:
        for record in read_records(json_lines(source), columns=reading.columns):
            if record.problem is None:
                groups += [group for group in record.groups if not only_labelled or labelled(group)]
            if len(groups) >= most:
                break
    return groups[:most]


def to_json(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Returns the groups (prompts with completions) as JSON objects. Raises InvalidRequest if they have more than
    MOST_BYTES bytes together.
    """
    rows = [{name: getattr(group, name) for name in SHOWN} for group in groups]
    size = sum(len(json.dumps(row)) for row in rows)
    if size > MOST_BYTES:
        message = (
            f"The rows have {size} bytes, but the rows of an evaluation can have at most {MOST_BYTES} together; "
            "send fewer rows, or a smaller max_items."
        )
        raise InvalidRequest(message, param="max_items")
    return rows


def group_of(row: dict[str, Any]) -> Group:
    """Returns the group (a prompt with its completions) from the JSON object that `to_json` made of it."""
    lists = {name: tuple(row[name]) for name in ("completions", "ratings") if row[name] is not None}
    return Group(**{**row, **lists})


def labelled(group: Group) -> tuple[Text, Text] | None:
    """Returns the best and the worst completion of the group (a prompt with its completions) by people's ratings.
    Returns None if all completions have the same rating, or if there are fewer than two completions.
    """
    if len(group.completions) < 2 or (group.ratings and group.ratings[0] == group.ratings[-1]):
        return None
    return group.completions[0], group.completions[-1]


def text_of(completion: Text) -> str:
    """Returns a completion as one text. If the completion is a list of messages, takes the messages of the assistant,
    and writes their tool calls as JSON.
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(said(message) for message in completion if message["role"] == "assistant")


def said(message: Any) -> str:
    """Returns a message as text: its content, and its tool calls as JSON."""
    parts = [message.get("content") or ""]
    if calls := message.get("tool_calls"):
        parts.append(json.dumps([call["function"] for call in calls], ensure_ascii=False))
    return "\n".join(part for part in parts if part)


def conversation(prompt: Text) -> str:
    """Returns a prompt as one text, for a judge to read. Each message follows the name of its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {said(message)}" for message in prompt)
