"""What the names of columns say, however they are spelled: `System`, `system prompt`, `systemInstruction`.

Standard library only.
"""

import re
from collections.abc import Set
from functools import lru_cache

LONGEST = 40  # characters of a name that may mean something
MOST_COLUMNS = 100  # of a row whose roles are looked for

SYSTEM_KEYS = frozenset({"system", "system_prompt"})
TEMPLATE_KEYS = frozenset({"chat_template_kwargs"})

_ANSWER = "(response|answer|output|completion|text|message|conversation|reasoning|thinking)?s?"
_NOUN = "response|answer|output|completion|candidate|generation|reply|model|option|choice"
_SYSTEM = "(custom)?sys(tem)?(prompt|message|instruction)?s?"
_ONE = "(chosen|accepted|preferred|better|good|winning|positive)"
_OTHER = "(rejected|dispreferred|nonpreferred|worse|bad|losing|negative)"
_WEIGHT = "(sample|loss|example|row|importance)?weight"
_OPINION = "thumbs(up|down)?|liked|disliked|desirable"

# Columns that say what the model should see, or which answer is better, wherever they are published.
_MEANT = re.compile(
    f"{_SYSTEM}|chattemplatekwargs|(available)?tools|functions|paralleltoolcalls|tool(definition|schema)s?"
    "|prompt|question|instructions?|input|query|context|(chat|conversation)?history|(retrieved)?(document|doc|passage)s?"
    "|conversations?|messages|dialogue|trajectory|thinking|reasoning|reasoningcontent"
    f"|(chosen|rejected|dispreferred|nonpreferred){_ANSWER}|(positive|negative)(response|message)s?"
    f"|(chosen|rejected)thoughts?|(thinking|reasoning|thoughts?)(chosen|rejected)|(assistant|response)?prefill"
    f"|completions?|label|ktotag|ranks|{_WEIGHT}|(loss|train|training)mask|winner|preference|(is)?tie|{_OPINION}"
)
_MEDIA = re.compile(r"(chosen|rejected)?(image|img|picture|photo|video|audio)s?(path|url|file|bytes|base64)?s?\d*")

# The role that a column of another name may have.
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
    """Of which side such a column is the score, as far as its name says it: `score_chosen`, `rejected_rating`. Ask it
    of names of at most LONGEST characters: it remembers them."""
    plain, sides = _plain(key), {"chosen": _ONE, "rejected": _OTHER}
    return next((side for side, word in sides.items() if re.fullmatch(f"{word}{_SCORE}|{_SCORE}{word}", plain)), None)


def says_something(key: str) -> bool:
    """Whether the name is of a prompt, an answer, a label, or anything else that the model should see."""
    return len(key) <= LONGEST and _says_something(key)


@lru_cache(maxsize=1024)
def _says_something(key: str) -> bool:
    plain = _plain(key)
    return (_MEANT.fullmatch(plain) or _MEDIA.fullmatch(plain)) is not None


def is_media(key: str) -> bool:
    return _MEDIA.fullmatch(_plain(key)) is not None


def holds_answer(key: str, name: str) -> bool:
    """Whether a column may hold the answer of that name: `response_a` that of A, `answer_1` or `answers` that of 1."""
    plain = _plain(name)
    names = f"({_NOUN})?s?{re.escape(plain)}" + (f"|({_NOUN})s" if plain.isdecimal() else "")
    return bool(plain) and re.fullmatch(names, _plain(key[:LONGEST])) is not None


def role_of(key: str) -> str | None:
    """The role that such a column may have."""
    plain = _plain(key[:LONGEST])
    return next((role for role, names in _ROLES.items() if re.fullmatch(names, plain)), None)


def likely_columns(keys: Set[str]) -> dict[str, str]:
    """The columns whose names look like those of roles that no column has."""
    if len(keys) > MOST_COLUMNS:
        return {}
    found = {role: key for key in sorted(keys, reverse=True) if (role := role_of(key))}
    return {role: found[role] for role in _ROLES if role in found and role not in keys}


def _plain(key: str) -> str:
    return re.sub(r"[\W_]", "", key).casefold()
