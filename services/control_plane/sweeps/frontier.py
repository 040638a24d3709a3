"""Finds the reward-KL frontier of a sweep: what each policy gained, and how far it moved from its reference for it.

This is figure 2 of the DPO paper (arXiv 2305.18290).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from services.control_plane.core.errors import InvalidRequest

X, Y = {"drift": "kl_per_sequence"}, {"score": "score", "compare": "win_rate"}  # results, by kind of evaluation


class Axes(NamedTuple):
    """The names of the two evaluations of a sweep that are drawn against each other, and of their results."""

    kl: tuple[str, str]
    reward: tuple[str, str]


def axes(kinds: Mapping[str, str], kl: str | None, reward: str | None) -> Axes:
    """Returns the axes of the frontier of a sweep whose evaluations have the `kinds`, by their names.

    `kl` and `reward` name evaluations; None takes the first one that fits. Raises InvalidRequest if none fits.
    """
    return Axes(_axis(kinds, kl, "kl", X), _axis(kinds, reward, "reward", Y))


def _axis(kinds: Mapping[str, str], name: str | None, param: str, results: Mapping[str, str]) -> tuple[str, str]:
    wanted = [name] if name is not None else list(kinds)
    found = [(each, results[kinds[each]]) for each in wanted if kinds.get(each) in results]
    if not found:
        what = " or ".join(results)
        said = f"'{name:.80}' is not one" if name is not None else "it has none"
        message = f"The axis '{param}' of a frontier needs an evaluation of the kind {what} in the sweep, but {said}."
        raise InvalidRequest(f"{message} Name one, or create a sweep with one.", param=param)
    return found[0]


def mark(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the points by rising KL, each with `on_frontier`: whether no other point has a higher reward at the same
    or a lower KL.
    """
    found, best = [], float("-inf")
    for point in sorted(points, key=lambda point: (point["kl"]["value"], -point["reward"]["value"])):
        found.append({**point, "on_frontier": point["reward"]["value"] > best})
        best = max(best, point["reward"]["value"])
    return found
