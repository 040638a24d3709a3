"""Turns the measured KL divergences and rewards of the policies of all seeds into tables and a picture."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks.training.frontier.runs import OPTIMUM, OPTIMUM_LEARNED, Run
from services.cli.jobs.frontier_picture import draw
from services.control_plane.sweeps.frontier import mark

BASELINE = "DPO"
KLS = (1.0, 1.5, 2.0, 2.5)  # at which methods are compared, nats
QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t, 97.5%, by seeds


def print_policies(found: Sequence[Run]) -> None:
    """Prints, for each method and beta, the KL divergence and the reward of the policy at the end of its training: the
    mean over seeds, with a 95% interval."""
    print("\n| method | beta | KL, nats | reward |\n|---|---|---|---|")
    for method, beta in _policies(found):
        kls, rewards = zip(*(run["points"][-1] for run in _of(found, method, beta)), strict=True)
        print(f"| {method} | {beta:g} | {_shown(kls)} | {_shown(rewards)} |")


def print_at_equal_kl(found: Sequence[Run]) -> None:
    """Prints two tables: the reward that each method reaches at each of the KL divergences in KLS, and the difference
    of this reward from that of DPO.

    A cell has the mean over seeds with a 95% interval; differences are taken within a seed. A cell is empty if, for
    some seed, the method's policies all have a lower KL divergence, or all have a higher one.
    """
    seeds = sorted({run["seed"] for run in found})
    curves = {method: [_curve(found, method, seed) for seed in seeds] for method, _ in _policies(found)}
    for title, minus in (("reward", None), (f"reward minus {BASELINE}'s", curves[BASELINE])):
        print(f"\n| {title} at a KL of | {' | '.join(map(str, KLS))} |\n|---{'|---' * len(KLS)}|")
        for method, of_method in curves.items():
            cells = []
            for kl in KLS:
                values = [curve(kl) for curve in of_method]
                if minus:
                    values = [value - curve(kl) for value, curve in zip(values, minus, strict=True)]
                cells.append("" if any(map(math.isnan, values)) else _shown(values))
            print(f"| {method} | {' | '.join(cells)} |")


def _curve(found: Sequence[Run], method: str, seed: int) -> Callable[[float], float]:
    """Returns a function from KL divergence to reward: the frontier of a method for one seed, from the results `found`.

    A point is on the frontier if no other point of the method has a higher reward at the same or a lower KL divergence.
    Between these points the function is linear. It returns nan for a KL divergence below the first or above the last of
    them.
    """
    points = [
        {"kl": {"value": kl}, "reward": {"value": reward}}
        for run in found
        if (run["seed"], run["method"]) == (seed, method)
        for kl, reward in run["points"]
    ]
    best = [(point["kl"]["value"], point["reward"]["value"]) for point in mark(points) if point["on_frontier"]]
    kls, rewards = zip(*best, strict=True)
    return lambda kl: float(np.interp(kl, kls, rewards, left=math.nan, right=math.nan))


def draw_frontier(found: Sequence[Run], path: Path) -> None:
    """Draws the reward of each policy at the end of its training against the policy's KL divergence, as a picture in
    the file `path`. A dashed line shows the optimum, as a mean over the seeds."""
    points = []
    for method, beta in _policies(found):
        if method != OPTIMUM_LEARNED:
            kls, rewards = zip(*(run["points"][-1] for run in _of(found, method, beta)), strict=True)
            is_best = method == OPTIMUM
            if is_best:
                kls, rewards = [mean(kls)] * len(kls), [mean(rewards)] * len(rewards)  # no bars on the line
            kl, reward = _interval(kls), _interval(rewards)
            points.append({"method": method, "parameters": {}, "kl": kl, "reward": reward, "on_frontier": is_best})
    shown = {"sweep_id": "frontier", "kl": "exact, held-out prompts", "reward": "the rule", "data": points}
    draw(shown, path)


def _policies(found: Sequence[Run]) -> list[tuple[str, float]]:
    """Returns the method and beta of each policy, without duplicates. Runs without a beta, such as the reference, are
    left out."""
    return [key for key in dict.fromkeys((run["method"], run["beta"]) for run in found) if key[1]]


def _of(found: Sequence[Run], method: str, beta: float) -> list[Run]:
    return [run for run in found if (run["method"], run["beta"]) == (method, beta)]


def _interval(values: Sequence[float]) -> dict[str, Any]:
    half = QUANTILES[len(values)] * stdev(values) / math.sqrt(len(values))
    return {"value": mean(values), "low": mean(values) - half, "high": mean(values) + half}


def _shown(values: Sequence[float]) -> str:
    interval = _interval(values)
    return f"{interval['value']:.2f} ± {interval['high'] - interval['value']:.2f}"
