"""Shows the demo's results: the answers of the policies before and after DPO side by side, and training curves."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

Curve = dict[str, list[float]]  # name of a column of the result file -> the column's value at each step


def read_curves(results: str) -> Curve:
    """Returns the columns of a job's result file by name, each as a list of numbers. The file is a CSV text with a line
    per step; empty cells are left out."""
    curves: Curve = {}
    for row in csv.DictReader(io.StringIO(results)):
        for column, value in row.items():
            if value:
                curves.setdefault(column, []).append(float(value))
    return curves


def draw(supervised: Curve, dpo: Curve, file: Path) -> None:
    """Draws the losses of both jobs, and the DPO job's reward margins and accuracies, into the image `file`."""
    import matplotlib

    matplotlib.use("Agg")  # this backend draws without a screen
    from matplotlib import pyplot

    panels = [
        ("supervised: loss", supervised, "train_loss"),
        ("DPO: loss", dpo, "train_loss"),
        ("DPO: reward margin", dpo, "train_reward_margin"),
        ("DPO: reward accuracy", dpo, "train_reward_accuracy"),
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(16, 3.6), layout="constrained")
    for axis, (title, curve, column) in zip(axes, panels, strict=True):
        axis.plot(curve["step"], curve[column])
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def print_answers(console: Console, prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
    table = Table("prompt", "before DPO", "after DPO", show_lines=True)
    for row in zip(prompts, before, after, strict=True):
        table.add_row(*(text if len(text) <= 300 else f"{text[:300]} …" for text in row))
    console.print(table)
