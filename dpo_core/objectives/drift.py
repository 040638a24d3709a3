"""Warns the user of a training run if the chosen completions become much less likely than under the reference model
while the margins grow. A margin is the reward of a chosen completion minus that of the rejected one."""

from collections import deque
from statistics import fmean

WINDOW = 10  # steps
FALLEN = 1.0  # nats; 1.0 below the reference means at most 37 % as likely


class Drift:
    """Watches the metrics of a training run, and warns once if the chosen completions become much less likely than
    under the reference model. Never warns for an objective without a reference."""

    def __init__(self) -> None:
        self._chosen: deque[float] = deque(maxlen=WINDOW)
        self._margins: deque[float] = deque(maxlen=WINDOW)
        self._has_warned = False

    def warning(self, metrics: dict[str, float]) -> str | None:
        """Takes the metrics of the latest training step. Returns a warning for the user if the chosen completions have
        become much less likely than under the reference model, and None otherwise. Means over the last WINDOW steps
        decide, because single batches differ."""
        if self._has_warned or not {"logratios/chosen", "rewards/margins"} <= metrics.keys():
            return None
        self._chosen.append(metrics["logratios/chosen"])
        self._margins.append(metrics["rewards/margins"])
        fallen, margin = -fmean(self._chosen), fmean(self._margins)
        self._has_warned = len(self._chosen) == WINDOW and fallen > FALLEN and margin > 0
        return _sentence(fallen, margin) if self._has_warned else None


def _sentence(fallen: float, margin: float) -> str:
    return (
        f"Chosen completions are {fallen:.1f} nats less likely than under the reference (mean of {WINDOW} steps) "
        f"while margins have grown to {margin:.2f}, because rejected completions become unlikely even faster. This is "
        "common with losses on margins, and harmless while the number of nats is small; if answers get worse, raise "
        "beta, lower the learning rate, train fewer epochs, or use rpo or dpop, which keep chosen completions likely."
    )
