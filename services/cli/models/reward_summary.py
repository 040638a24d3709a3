"""Compares the rewards that a model gave completions with the ratings that the data file gives them.

The summary says how often rewards and ratings prefer the same completion, and by how much the rewards of better
completions are higher.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Counts rows, and the rows in which rewards and ratings agree on which completions are best; adds up the margins
    of the rows.

    A row's margin is the mean reward of its best-rated completions minus the mean reward of the others.
    """

    num_rows: int = 0
    num_correct: int = 0
    margins: float = 0.0

    def add(self, better: list[float], worse: list[float]) -> None:
        self.num_rows += 1
        self.num_correct += min(better) > max(worse)
        self.margins += sum(better) / len(better) - sum(worse) / len(worse)

    @property
    def accuracy(self) -> float:
        """The share of rows in which each best-rated completion has a higher reward than each completion with a lower
        rating."""
        return self.num_correct / self.num_rows

    def line(self) -> str:
        return f"accuracy {self.accuracy:.2%}  margin {self.margins / self.num_rows:.4f}  rows {self.num_rows}"


@dataclass
class Summary:
    """Sums up how rewards agree with ratings: over all rows, and over the rows of each subset that the file names.

    Rows whose completions all have the same rating are left out.
    """

    all: Tally = field(default_factory=Tally)
    subsets: dict[str, Tally] = field(default_factory=dict)

    def add(self, result: Mapping[str, Any]) -> None:
        """Adds one row to the sums. `result` is a line of the results that `raydpo rewards` writes."""
        ratings, rewards = result["ratings"], [each["reward"] for each in result["completions"]]
        if ratings is None or len(set(ratings)) < 2:
            return
        best = max(ratings)
        better = [reward for reward, rating in zip(rewards, ratings, strict=True) if rating == best]
        worse = [reward for reward, rating in zip(rewards, ratings, strict=True) if rating < best]
        self.all.add(better, worse)
        if result["subset"] is not None:
            self.subsets.setdefault(result["subset"], Tally()).add(better, worse)

    def lines(self) -> Iterator[str]:
        if not self.all.num_rows:
            return
        for name, tally in sorted(self.subsets.items()):
            yield f"{name}: {tally.line()}"
        if self.subsets:
            mean = sum(tally.accuracy for tally in self.subsets.values()) / len(self.subsets)
            yield f"mean of {len(self.subsets)} subsets: accuracy {mean:.2%}"
        yield f"all: {self.all.line()}"
