"""Compares rewards with the ratings in a file.

It counts how often both prefer the same completion, and by how much the better completions have the higher rewards.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Counts the rows of a set, those on which rewards and ratings agree, and the sum of their margins.

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
        """The share of rows in which every best-rated completion has a higher reward than every other completion."""
        return self.num_correct / self.num_rows

    def line(self) -> str:
        return f"accuracy {self.accuracy:.2%}  margin {self.margins / self.num_rows:.4f}  rows {self.num_rows}"


@dataclass
class Summary:
    """Adds up the results of all rows, and of the rows of each subset that the file names.

    Rows whose completions all have the same rating are left out.
    """

    all: Tally = field(default_factory=Tally)
    subsets: dict[str, Tally] = field(default_factory=dict)

    def add(self, result: Mapping[str, Any]) -> None:
        """Adds the result of one row, as `raydpo rewards` writes it, to the sums."""
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
