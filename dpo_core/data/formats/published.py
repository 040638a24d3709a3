"""Reads public preference data sets that have column names of their own. Uses only the standard library.

Each reader is a function that yields the groups of a row. A group is a prompt with its completions. In the groups of
these readers, prompts and completions are messages.
"""

from collections.abc import Callable, Iterator

from dpo_core.data.groups import Group, answer, best_first, items, parted, question
from dpo_core.data.jsonl import Row
from dpo_core.data.messages import Message, messages_of, refuse_empty_message
from dpo_core.data.values import number_of, says_nothing, shown, string_of

Reader = Callable[[Row], Iterator[Group]]


def pair(prompt: str, chosen: str, rejected: str) -> Reader:
    """Returns a reader for rows with a question, a better answer and a worse answer, in the columns that `prompt`,
    `chosen` and `rejected` name."""

    def read(row: Row) -> Iterator[Group]:
        better = answer(row, f"/{chosen}", row.value[chosen])
        worse = answer(row, f"/{rejected}", row.value[rejected], may_be_empty=True)
        yield Group(_question(row, prompt), (better, worse), row.line)

    return read


def _question(row: Row, column: str) -> list[Message]:
    """Returns the question in the row's column `column`, as messages. In Alpaca's format the question is in the column
    `instruction`, and a column `input` may have a text that belongs to it; this text is added to the end of the
    question."""
    messages = question(row, column)
    extra = row.value.get("input")
    if column == "instruction" and extra not in (None, ""):
        messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\n{string_of(row, '/input', extra)}"}
    return messages


def two(prompt: str, first: str, second: str, lead: Callable[[Row], float]) -> Reader:
    """Returns a reader for rows with a question and two answers, in the columns that `prompt`, `first` and `second`
    name.

    `lead` is a function that returns by how much the row's second answer is better than its first. 0 is a tie; a
    negative number means that the first is better.
    """

    def read(row: Row) -> Iterator[Group]:
        answers = [answer(row, f"/{column}", row.value[column], may_be_empty=True) for column in (first, second)]
        yield best_first(row, _question(row, prompt), answers, _ratings(lead(row)))

    return read


def _ratings(lead: float) -> tuple[float, float]:
    """Returns ratings for two answers, whose difference is `lead`. A positive `lead` means that the second answer is
    better, a negative one that the first is better."""
    return max(0.0, -lead), max(0.0, lead)


def strength(column: str) -> Callable[[Row], float]:
    """Returns a function that reads from `column` by how much a row's second answer is better than the first. The
    number is negative if the first answer is better, as in the data sets HelpSteer 2 and 3."""
    return lambda row: number_of(row, f"/{column}", row.value[column])


def scores(first: str, second: str) -> Callable[[Row], float]:
    """Returns a function that computes by how much the row's second answer is better than the first. The columns
    `first` and `second` hold the scores of the first and the second answer."""
    return lambda row: number_of(row, f"/{second}", row.value[second]) - number_of(row, f"/{first}", row.value[first])


def choice(column: str, first: object, second: object, *ties: object) -> Callable[[Row], float]:
    """Returns a function that reads from `column` which of a row's two answers is better. It returns -1 if the value in
    the column is `first` (the first answer is better), 1 if it is `second`, and 0 if it is one of `ties`."""
    leads: dict[object, float] = {first: -1.0, second: 1.0, **dict.fromkeys(ties, 0.0)}

    def lead(row: Row) -> float:
        value = row.value[column]
        if isinstance(value, dict | list | bool) or value not in leads:  # tables may write 1 as 1.0, which equals 1
            known = ", ".join(map(str, leads))
            raise row.invalid(f"/{column}", "unknown_choice", f"is {shown(value)}; it must be one of {known}.")
        return leads[value]

    return lead


def read_a_or_b(row: Row) -> Iterator[Group]:
    """Reads a row with two answers, and a verdict: the letter of the better answer (A or B) or the word `tie`."""
    return two("prompt", "response_a", "response_b", _letter)(row)


def _letter(row: Row) -> float:
    winner = string_of(row, "/winner", row.value["winner"])
    letter = winner.casefold().removeprefix("model_").removeprefix("response_")
    if letter not in ("a", "b", "tie"):
        raise row.invalid("/winner", "unknown_choice", f"is {shown(winner)}; it must be A, B or tie.")
    return {"a": -1.0, "b": 1.0, "tie": 0.0}[letter]


def read_arena(row: Row) -> Iterator[Group]:
    """Reads a row of LMSYS's Chatbot Arena: two models' conversations with the same questions, and the name of the
    model that won."""
    columns = ("conversation_a", "conversation_b")
    sides = [messages_of(row, f"/{column}", row.value[column]) for column in columns]
    prompt, answers = parted(row, columns, sides, may_be_empty=(True, True))
    lead = choice("winner", "model_a", "model_b", "tie", "tie (bothbad)")(row)
    yield best_first(row, prompt, answers, _ratings(lead))


def read_rated(row: Row) -> Iterator[Group]:
    """Reads a row of HelpSteer 1 and 2: one answer with several ratings. The rating `helpfulness` counts, because the
    authors of these data rank answers by it."""
    completion = answer(row, "/response", row.value["response"], may_be_empty=True)
    rating = number_of(row, "/helpfulness", row.value["helpfulness"])
    yield Group(_question(row, "prompt"), (completion,), row.line, (rating,))


def read_summaries(row: Row) -> Iterator[Group]:
    """Reads a row of OpenAI's comparisons of summaries (arXiv 2009.01325). The prompt is written as in TRL's data set
    tldr-preference."""
    info = row.value["info"]
    assert isinstance(info, dict)
    summaries = row.value["summaries"]
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise row.invalid("/summaries", "wrong_type", "must be a list of two summaries.")
    answers = []
    for number, item in enumerate(summaries):
        if not isinstance(item, dict) or "text" not in item:
            raise row.invalid(f"/summaries/{number}", "wrong_type", "must be an object with the key 'text'.")
        answers.append(answer(row, f"/summaries/{number}/text", item["text"]))
    lead = choice("choice", 0, 1)(row)
    yield best_first(row, [{"role": "user", "content": _to_summarize(row, info)}], answers, _ratings(lead))


def _to_summarize(row: Row, info: dict[str, object]) -> str:
    """Returns a prompt that asks for a summary of the post or article in `info`."""
    names = {"subreddit": "SUBREDDIT: r/", "title": "TITLE: ", "post": "POST: ", "article": ""}
    parts = [f"{label}{string_of(row, f'/info/{name}', info[name])}" for name, label in names.items() if info.get(name)]
    if not parts:
        raise row.invalid("/info", "missing_key", "has neither a post nor an article to summarize; add one of them.")
    return "\n\n".join([*parts, "TL;DR:"])


def read_ranked_completions(row: Row) -> Iterator[Group]:
    """Reads a row in the format of NeMo RL: a context (the prompt), and completions with ranks. The best completion has
    rank 0. A completion is a list of messages."""
    completions, ranks = [], []
    for number, item in enumerate(items(row, "completions", "completion", "rank")):
        completions.append(answer(row, f"/completions/{number}/completion", item["completion"]))
        ranks.append(-number_of(row, f"/completions/{number}/rank", item["rank"]))
    yield best_first(row, question(row, "context"), completions, ranks)


def read_vertex(row: Row) -> Iterator[Group]:
    """Reads a row in the format of Google's Vertex AI: a prompt in `contents`, and completions with scores. Every
    message is a list of parts."""
    prompt = [_of_parts(row, f"/contents/{number}", item) for number, item in enumerate(_list(row, "contents"))]
    if prompt[-1]["role"] != "user":
        raise row.invalid("/contents", "invalid_order", "must end with a message of the role 'user'.")
    for key in VERTEX_SYSTEM_KEYS:
        if not says_nothing(value := row.value.get(key)):
            system = {"role": "system", **value} if isinstance(value, dict) else value
            prompt.insert(0, _of_parts(row, f"/{key}", system))
    completions, ratings = [], []
    for number, item in enumerate(items(row, "completions", "completion", "score")):
        message = _of_parts(row, f"/completions/{number}/completion", item["completion"])
        refuse_empty_message(row, f"/completions/{number}/completion", message)
        completions.append([message])
        ratings.append(number_of(row, f"/completions/{number}/score", item["score"]))
    yield best_first(row, prompt, completions, ratings)


VERTEX_SYSTEM_KEYS = ("systemInstruction", "system_instruction")
_VERTEX_ROLES = {"user": "user", "model": "assistant", "system": "system"}


def _of_parts(row: Row, pointer: str, value: object) -> Message:
    """Returns the message in a `content` object of Vertex AI. The object holds a list of parts. Raises InvalidRow if a
    part is not a text."""
    parts = value.get("parts") if isinstance(value, dict) else None
    role = _VERTEX_ROLES.get(str(value.get("role"))) if isinstance(value, dict) else None
    if role is None or not isinstance(parts, list):
        raise row.invalid(
            pointer, "wrong_type", "must be an object with the keys 'role' (user or model) and 'parts' (a list)."
        )
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or part.keys() != {"text"}:
            what = "must be an object with only the key 'text', because other parts are not supported; remove the part."
            raise row.invalid(f"{pointer}/parts/{number}", "unsupported", what)
    texts = [string_of(row, f"{pointer}/parts/{number}/text", part["text"]) for number, part in enumerate(parts)]
    return {"role": role, "content": "\n".join(texts)}


def _list(row: Row, column: str) -> list[object]:
    value = row.value[column]
    if not isinstance(value, list) or not value:
        raise row.invalid(f"/{column}", "wrong_type", "must be a list with at least one item.")
    return value


# In SHP (arXiv 2110.08420) the label 1 means that A is better; WebGPT's comparisons give each answer a score.
read_shp = two("history", "human_ref_A", "human_ref_B", choice("labels", 1, 0))
read_alpaca_farm = two("instruction", "output_1", "output_2", choice("preference", 1, 2))
read_webgpt = two("question", "answer_0", "answer_1", scores("score_0", "score_1"))
