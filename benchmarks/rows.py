"""Makes random rows and a random model for benchmarks. The texts are random words, and as long as in real dialogues."""

import random
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.base_model import make_base_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpo_core.encoding.encode import EncodedGroup

Row = dict[str, Any]


def dialogues(num_rows: int, *, num_completions: int, seed: int = 0) -> list[Row]:
    """Returns `num_rows` rows of random words: each has a prompt and `num_completions` answers, the best answer first.

    Lengths are log-normal. Prompts have 126 tokens on average, best answers 41 and other answers 53.
    """
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)]

    def message(role: str, mean: float) -> Row:
        count = max(1, round(mean * rng.lognormvariate(-0.18, 0.6)))
        return {"role": role, "content": " ".join(rng.choices(words, k=count))}

    return [
        {
            "prompt": [message("user", 123)],
            "completions": [[message("assistant", 40 if place == 0 else 52)] for place in range(num_completions)],
        }
        for _ in range(num_rows)
    ]


def encode(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> "list[EncodedGroup]":
    """Returns the token ids of the rows' prompts and completions."""
    from dpo_core import Group, encode_group

    return [encode_group(Group(row["prompt"], row["completions"], line), tokenizer) for line, row in enumerate(rows, 1)]


def as_pairs(row: Row) -> Iterator[Row]:
    """Yields the preference pairs of a ranked row: each completion as chosen with each worse completion as rejected."""
    for chosen, rejected in combinations(row["completions"], 2):
        yield {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


def save_model(folder: Path, rows: list[Row]) -> None:
    """Saves a Llama with 40M random weights, and a tokenizer with 32,000 tokens that is trained on the rows.

    A word of the rows is about one token.
    """
    texts = [m["content"] for row in rows for message in (row["prompt"], *row["completions"]) for m in message]
    make_base_model(folder, texts, hidden_size=512, num_layers=8, vocabulary=32_000)
