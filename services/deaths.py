"""Searches the long messages of Ray and Python for the reason why a process died, and words it as one sentence for the
user."""

import re
from collections.abc import Sequence

MEMORY = "memory ran out on the node"
FIGURES = re.compile(r"Memory on the node \(IP: (\S+), ID: \S+\) was ([\d.]+)GB used / ([\d.]+)GB limit")
HELD = re.compile(r"^Selected to kill: .*actual memory used=([\d.]+)GB", re.MULTILINE)
ERROR = re.compile(r"^(?:[\w.]*\.)?(\w*(?:Error|Exception|Timeout)): +(\S.*)$", re.MULTILINE)
REFUSED = re.compile(
    r"ACCESS_DENIED|Access ?Denied|Permission denied|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken"
    r"|PERMISSION_DENIED|UNAUTHENTICATED"  # Google's
)
NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist")
LONGEST = 300  # most characters of the line that names an error

MEANINGS: Sequence[tuple[str, str]] = (  # Ray 2.60's messages without figures: pattern, meaning
    (r"address the out of memory issue", f"{MEMORY}, and Ray killed processes of the job there"),
    (r"its node has died|node it was running on is dead", "a node that it ran on was lost"),
    (
        r"Worker unexpectedly exits",
        "one of its processes was killed or crashed without a message, which often means that memory ran out",
    ),
)


def cause_in(text: str) -> str | None:
    """Returns why processes ended, according to `text` (logs or messages of errors). The result is the reason that Ray
    gives in `text` or, without such a reason, the last Python error in `text`. Returns None if `text` has neither.

    The result begins in lower case and has no full stop, because it becomes a part of a sentence.
    """
    return killer_in(text) or _error_in(text)


def killer_in(text: str) -> str | None:
    """Returns how processes ended, as a part of a sentence, if `text` says that Ray killed them or that their node was
    lost. Returns None if `text` says nothing of this kind."""
    if figures := FIGURES.search(text):
        ip, used, limit = figures.groups()
        held = [float(gigabytes) for gigabytes in HELD.findall(text)]
        killed = f"; Ray killed processes that held {sum(held):.2f} GB" if held else ""
        return f"{MEMORY} {ip}: {used} GB of {limit} GB were in use{killed}"
    if earlier_sentence := re.search(rf"{MEMORY} .*", text):
        return earlier_sentence[0]
    for pattern, meaning in MEANINGS:
        if re.search(pattern, text):
            return meaning
    return None


def _error_in(text: str) -> str | None:
    errors = ERROR.findall(text)
    if not errors:
        return None
    line = ": ".join(errors[-1])[:LONGEST].rstrip(".")
    if NO_BUCKET.search(line):
        return f"storage has no such bucket: {line}"
    return f"storage refused access: {line}" if REFUSED.search(line) else line
