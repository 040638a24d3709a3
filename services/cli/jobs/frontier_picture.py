"""Draws the reward-KL frontier of a sweep as a picture: the reward of each policy against the policy's KL divergence
from its reference model.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.cli.client import fail

FORMATS = (".svg", ".png", ".pdf")
LABEL_OFFSET, LABEL_WIDTH, LABEL_HEIGHT = 8.0, 90.0, 14.0  # pixels
Point = Mapping[str, Any]


def draw(frontier: Mapping[str, Any], path: Path) -> None:
    """Draws a frontier, as GET /x/sweeps/{id}/frontier returns it, and writes the picture to the file `path`.

    Each training method has a colour. Bars show the 95% intervals. A dashed line joins the points on the frontier:
    those for which no other point has a higher reward at the same or a lower KL. Exits with an error if the file's
    format is unknown, if the frontier has no points, or if matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        fail(f"{path} has no known format; give a name that ends with {', '.join(FORMATS)}.")
    points: Sequence[Point] = frontier["data"]
    if not points:
        fail("No trial of the sweep has both results yet, so there is nothing to draw; wait until trials have ended.")
    try:
        import matplotlib
    except ModuleNotFoundError:
        fail("Drawing needs matplotlib; install it with `pip install 'raydpo[local]'`, or leave --output out.")
    matplotlib.use("Agg")  # this backend draws without a screen
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": str(frontier["sweep_id"])}):
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        best = [point for point in points if point["on_frontier"]]
        axes.plot(_values(best, "kl"), _values(best, "reward"), "--", color="0.6", linewidth=1, zorder=1)
        for method in dict.fromkeys(point["method"] for point in points):
            of_method = [point for point in points if point["method"] == method]
            x, y = _values(of_method, "kl"), _values(of_method, "reward")
            xerr, yerr = _bars(of_method, "kl"), _bars(of_method, "reward")
            axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="o", capsize=2, label=method)
        _write_labels(axes, points)
        axes.set(xlabel=f"KL(policy ‖ reference), nats ({frontier['kl']})", ylabel=f"reward ({frontier['reward']})")
        axes.grid(alpha=0.3)
        axes.legend(title="method")
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        pyplot.close(figure)


def _write_labels(axes: Any, points: Sequence[Point]) -> None:
    """Writes the values of each trial (job of the sweep) beside its point. A label that would cover another one moves
    up.
    """
    places: list[tuple[float, float]] = []  # of the labels so far, in pixels
    for point in points:
        at = (point["kl"]["value"], point["reward"]["value"])
        x, y = axes.transData.transform(at)
        up = LABEL_OFFSET
        while any(abs(x - left) < LABEL_WIDTH and abs(y + up - low) < LABEL_HEIGHT for left, low in places):
            up += LABEL_HEIGHT
        places.append((x, y + up))
        axes.annotate(_label(point), at, xytext=(LABEL_OFFSET, up), textcoords="offset pixels", fontsize=8)


def _values(points: Sequence[Point], axis: str) -> list[float]:
    return [point[axis]["value"] for point in points]


def _bars(points: Sequence[Point], axis: str) -> list[list[float]]:
    """Returns the lengths of the points' error bars along the axis `axis` ("kl" or "reward"): a list of the lengths
    below the points' values, and a list of those above."""
    below = [max(0.0, point[axis]["value"] - point[axis]["low"]) for point in points]
    return [below, [max(0.0, point[axis]["high"] - point[axis]["value"]) for point in points]]


def _label(point: Point) -> str:
    """Returns the values of a point's trial (job of the sweep) as a text, without the training method, because the
    point's colour shows it.
    """
    shown = {path.rpartition(".")[2]: value for path, value in point["parameters"].items() if path != "method.type"}
    return ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in shown.items()
    )
