"""Why processes on a Ray cluster died, in a sentence for a user, from what Ray and Python say at length."""

import re
from collections.abc import Sequence

MEMORY = "memory ran out on the node"
FIGURES = re.compile(r"Memory on the node \(IP: (\S+), ID: \S+\) was ([\d.]+)GB used / ([\d.]+)GB limit")
HELD = re.compile(r"^Selected to kill: .*actual memory used=([\d.]+)GB", re.MULTILINE)
ERROR = re.compile(r"^(?:[\w.]*\.)?(\w*(?:Error|Exception|Timeout)): +(\S.*)$", re.MULTILINE)
REFUSED = re.compile(
    r"ACCESS_DENIED|Access ?Denied|Permission denied|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken"
)
LONGEST = 300  # characters of an error's own line

TOLD: Sequence[tuple[str, str]] = (  # what Ray 2.60 writes where it has no figures, and what that means
    (r"address the out of memory issue", f"{MEMORY}, and Ray killed processes of the job there"),
    (r"its node has died|node it was running on is dead", "a node that it ran on was lost"),
    (
        r"Worker unexpectedly exits",
        "one of its processes was killed or crashed, and left no word: the kernel kills so where memory runs out",
    ),
)


def cause_in(text: str) -> str | None:
    """What killed, or else the last error; in lower case and without a full stop. None where the text has neither."""
    return killer_in(text) or _error_in(text)


def killer_in(text: str) -> str | None:
    """What the cluster did to processes."""
    if figures := FIGURES.search(text):
        ip, used, limit = figures.groups()
        held = [float(found) for found in HELD.findall(text)]
        killed = f"; Ray killed processes that held {sum(held):.2f} GB" if held else ""
        return f"{MEMORY} {ip}: {used} GB of {limit} GB were in use{killed}"
    if told_before := re.search(rf"{MEMORY} .*", text):
        return told_before[0]
    for pattern, meaning in TOLD:
        if re.search(pattern, text):
            return meaning
    return None


def _error_in(text: str) -> str | None:
    errors = ERROR.findall(text)
    if not errors:
        return None
    line = ": ".join(errors[-1])[:LONGEST].rstrip(".")
    return f"storage refused it: {line}" if REFUSED.search(line) else line
