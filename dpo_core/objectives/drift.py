"""A word in time: chosen completions get less likely while the margins grow."""

from collections import deque
from statistics import fmean

WINDOW = 10  # steps
FALLEN = 1.0  # nats below the reference: less than 37 % as likely


class Drift:
    """Watches a run's metrics. Silent where there is no reference, and after it has spoken."""

    def __init__(self) -> None:
        self._chosen: deque[float] = deque(maxlen=WINDOW)
        self._margins: deque[float] = deque(maxlen=WINDOW)
        self._spoken = False

    def warning(self, metrics: dict[str, float]) -> str | None:
        """What to tell the user after a step with these metrics. A mean of the last steps, as batches differ."""
        if self._spoken or not {"logratios/chosen", "rewards/margins"} <= metrics.keys():
            return None
        self._chosen.append(metrics["logratios/chosen"])
        self._margins.append(metrics["rewards/margins"])
        fallen, margin = -fmean(self._chosen), fmean(self._margins)
        self._spoken = len(self._chosen) == WINDOW and fallen > FALLEN and margin > 0
        return _sentence(fallen, margin) if self._spoken else None


def _sentence(fallen: float, margin: float) -> str:
    return (
        f"Chosen completions are {fallen:.1f} nats less likely than under the reference (mean of {WINDOW} steps) "
        f"while margins have grown to {margin:.2f}: rejected ones fall faster. That is common with losses on margins "
        "and harmless while small; if answers get worse, raise beta, lower the learning rate or train fewer epochs, "
        "or take rpo or dpop, which hold chosen completions up."
    )
