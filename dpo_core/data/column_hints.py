"""Guesses the meaning of columns from their names in any spelling, such as `System`, `system prompt`,
`systemInstruction`. Uses only the standard library."""

import re
from collections.abc import Set
from functools import lru_cache

LONGEST = 40  # characters; the meaning of a longer name is not guessed
MOST_COLUMNS = 100  # columns of a row; roles are not guessed in rows with more

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

# For each role, a pattern of the names that a column with this role may have.
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
    """Returns the side ('chosen' or 'rejected') whose score the column holds, judging by the column's name; None if the
    name does not say.

    The name must have at most LONGEST characters, because this function caches names.
    """
    plain, sides = _plain(key), {"chosen": _ONE, "rejected": _OTHER}
    return next((side for side, word in sides.items() if re.fullmatch(f"{word}{_SCORE}|{_SCORE}{word}", plain)), None)


def says_something(key: str) -> bool:
    """Whether the column's name means a prompt, an answer, a label, or anything else that the model should learn
    from."""
    return len(key) <= LONGEST and _says_something(key)


@lru_cache(maxsize=1024)
def _says_something(key: str) -> bool:
    plain = _plain(key)
    return (_MEANT.fullmatch(plain) or _MEDIA.fullmatch(plain)) is not None


def is_media(key: str) -> bool:
    """Whether the column's name says that the column holds images, videos or sounds."""
    return _MEDIA.fullmatch(_plain(key)) is not None


def holds_answer(key: str, name: str) -> bool:
    """Whether the column `key` may hold the answer called `name`: `response_a` holds A; `answer_1` or `answers` holds
    1."""
    plain = _plain(name)
    names = f"({_NOUN})?s?{re.escape(plain)}" + (f"|({_NOUN})s" if plain.isdecimal() else "")
    return bool(plain) and re.fullmatch(names, _plain(key[:LONGEST])) is not None


def role_of(key: str) -> str | None:
    """Returns the role of a column, such as `prompt`, guessed from the column's name; None if the name fits no role."""
    plain = _plain(key[:LONGEST])
    return next((role for role, names in _ROLES.items() if re.fullmatch(names, plain)), None)


def likely_columns(keys: Set[str]) -> dict[str, str]:
    """Returns a column for each role that is not the name of a column, if the name of a column suggests the role."""
    if len(keys) > MOST_COLUMNS:
        return {}
    columns = {role: key for key in sorted(keys, reverse=True) if (role := role_of(key))}
    return {role: columns[role] for role in _ROLES if role in columns and role not in keys}


def _plain(key: str) -> str:
    """Returns the column's name in lower case, without punctuation and spaces."""
    return re.sub(r"[\W_]", "", key).casefold()
