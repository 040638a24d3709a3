"""Guesses from the name of a column what the column holds. Uses only the standard library.

A column is a key in the rows of a file of preference data. The spelling of its name hardly matters: `System`, `system
prompt` and `systemInstruction` all mean a system prompt.
"""

import re
from collections.abc import Set
from functools import lru_cache

LONGEST = 40  # the most characters of a name whose meaning is guessed
MOST_COLUMNS = 100  # the most columns of a row for which roles are guessed

SYSTEM_KEYS = frozenset({"system", "system_prompt"})
TEMPLATE_KEYS = frozenset({"chat_template_kwargs"})

_ANSWER = "(response|answer|output|completion|text|message|conversation|reasoning|thinking)?s?"
_NOUN = "response|answer|output|completion|candidate|generation|reply|model|option|choice"
_SYSTEM = "(custom)?sys(tem)?(prompt|message|instruction)?s?"
_ONE = "(chosen|accepted|preferred|better|good|winning|positive)"
_OTHER = "(rejected|dispreferred|nonpreferred|worse|bad|losing|negative)"
_WEIGHT = "(sample|loss|example|row|importance)?weight"
_OPINION = "thumbs(up|down)?|liked|disliked|desirable"

# Names of columns in public data sets that hold texts for the model to see, or which answer is better.
_MEANT = re.compile(
    f"{_SYSTEM}|chattemplatekwargs|(available)?tools|functions|paralleltoolcalls|tool(definition|schema)s?"
    "|prompt|question|instructions?|input|query|context|(chat|conversation)?history|(retrieved)?(document|doc|passage)s?"
    "|conversations?|messages|dialogue|trajectory|thinking|reasoning|reasoningcontent"
    f"|(chosen|rejected|dispreferred|nonpreferred){_ANSWER}|(positive|negative)(response|message)s?"
    f"|(chosen|rejected)thoughts?|(thinking|reasoning|thoughts?)(chosen|rejected)|(assistant|response)?prefill"
    f"|completions?|label|ktotag|ranks|{_WEIGHT}|(loss|train|training)mask|winner|preference|(is)?tie|{_OPINION}"
)
_MEDIA = re.compile(r"(chosen|rejected)?(image|img|picture|photo|video|audio)s?(path|url|file|bytes|base64)?s?\d*")

# For each role (the standard name for what a column holds), a pattern of the names that such a column may have.
_ROLES = {
    "system": _SYSTEM,
    "prompt": "(user)?(prompt|question|query|instruction|input|problem)(text)?",
    "chosen": f"(response|answer)?{_ONE}{_ANSWER}",
    "rejected": f"(response|answer)?{_OTHER}{_ANSWER}",
    "completions": "(completion|response|answer|output|generation)s",
    "completion": "(model)?(completion|response|answer|output)",
    "label": f"label|ktotag|{_OPINION}",
    "weight": _WEIGHT,
    "scores": "(score|rating|reward)s?",
    "ranks": "rank(ing)?s?",
    "messages": "messages|conversations?|dialogue|trajectory",
}


_SCORE = "(avg|average|mean)?(score|rating|reward)s?"


@lru_cache(maxsize=1024)
def side_rated(key: str) -> str | None:
    """Returns which completion of a pair a column rates, guessed from the column's name: 'chosen' for `chosen_score`,
    'rejected' for `rating_rejected`, None if the name does not say.

    `key` is the column's name. It must have at most LONGEST characters, because this function caches names.
    """
    plain, sides = _plain(key), {"chosen": _ONE, "rejected": _OTHER}
    return next((side for side, word in sides.items() if re.fullmatch(f"{word}{_SCORE}|{_SCORE}{word}", plain)), None)


def says_something(key: str) -> bool:
    """Whether the name of a column (`key`) suggests contents that a model should learn from, such as a prompt, an
    answer, a label, tools or images. False for a name with more than LONGEST characters."""
    return len(key) <= LONGEST and _says_something(key)


@lru_cache(maxsize=1024)
def _says_something(key: str) -> bool:
    plain = _plain(key)
    return (_MEANT.fullmatch(plain) or _MEDIA.fullmatch(plain)) is not None


def is_media(key: str) -> bool:
    """Whether the column's name, `key`, suggests that the column holds images, videos or sounds."""
    return _MEDIA.fullmatch(_plain(key)) is not None


def holds_answer(key: str, name: str) -> bool:
    """Whether the column called `key` may hold the text of the answer that the row calls `name`.

    Some rows name an answer in one column, such as "A" in `winner`, and have the answer's text in another column. The
    text of the answer "A" may be in `response_a`. The text of the answer "1" may be in `answer_1`, or in a list
    `answers`.
    """
    plain = _plain(name)
    names = f"({_NOUN})?s?{re.escape(plain)}" + (f"|({_NOUN})s" if plain.isdecimal() else "")
    return bool(plain) and re.fullmatch(names, _plain(key[:LONGEST])) is not None


def role_of(key: str) -> str | None:
    """Returns the standard name for the contents of a column, such as `prompt`, `chosen` or `label`, guessed from the
    column's own name, `key`. Returns None if no standard name fits."""
    plain = _plain(key[:LONGEST])
    return next((role for role, names in _ROLES.items() if re.fullmatch(names, plain)), None)


def likely_columns(keys: Set[str]) -> dict[str, str]:
    """Returns the columns whose names resemble a standard name such as `prompt` or `chosen`. The keys of the result are
    the standard names; the values are the columns' own names.

    `keys` are the names of a row's columns. Standard names that are among them need no guess and are left out. The
    result is empty if there are more than MOST_COLUMNS columns.
    """
    if len(keys) > MOST_COLUMNS:
        return {}
    columns = {role: key for key in sorted(keys, reverse=True) if (role := role_of(key))}
    return {role: columns[role] for role in _ROLES if role in columns and role not in keys}


def _plain(key: str) -> str:
    """Returns a column's name in lower case, without punctuation and spaces."""
    return re.sub(r"[\W_]", "", key).casefold()
