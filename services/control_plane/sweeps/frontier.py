"""Finds the reward-KL frontier of a sweep, which compares the policies' rewards with their KL divergences from the
reference model.

Figure 2 of the DPO paper (arXiv 2305.18290) shows such frontiers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from services.control_plane.core.errors import InvalidRequest

X, Y = {"drift": "kl_per_sequence"}, {"score": "score", "compare": "win_rate"}  # results, by kind of evaluation


class Axes(NamedTuple):
    """The two axes of a frontier: the KL divergence and the reward of policies. Each axis is a pair: the name of an
    evaluation of the sweep, and the name of the result of this evaluation that is drawn, such as ("reward", "score").
    """

    kl: tuple[str, str]
    reward: tuple[str, str]


def axes(kinds: Mapping[str, str], kl: str | None, reward: str | None) -> Axes:
    """Returns the axes of the frontier of a sweep: the evaluations to draw against each other, and their results.

    `kinds` maps the names of the sweep's evaluations to their kinds, such as `drift`. `kl` and `reward` are the names
    of the evaluations to draw; if one of them is None, the first evaluation of a suitable kind is taken. Raises
    InvalidRequest if no evaluation is suitable.
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
    """Returns the points sorted by rising KL, each with a field `on_frontier`.

    `on_frontier` is true if no other point has at least the same reward at the same or a lower KL.
    """
    found, best = [], float("-inf")
    for point in sorted(points, key=lambda point: (point["kl"]["value"], -point["reward"]["value"])):
        found.append({**point, "on_frontier": point["reward"]["value"] > best})
        best = max(best, point["reward"]["value"])
    return found
