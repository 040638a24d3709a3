"""Measures the speed of the tokenizer's own batch call, which is an upper limit for every program that calls the
tokenizer."""

import json
import os
import time
from itertools import islice
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROWS_PER_CALL = 1000

_loaded: tuple[Any, list[list[str]]]  # the tokenizer and the texts of each row, in each process of the pool


def tokens_per_second(model: Path, file: Path, num_rows: int, *, processes: int, threads: bool) -> float:
    """Returns the tokens per second at which several processes together tokenize the first `num_rows` rows of a file.

    The time excludes loading the tokenizer and rendering the chat template. With `threads`, each tokenizer may use
    several threads.
    """
    context = get_context("spawn")
    ready = context.Barrier(processes + 1)
    with (
        patch.dict(os.environ, TOKENIZERS_PARALLELISM=str(threads).lower()),
        context.Pool(processes, _load, (model, file, num_rows, ready)) as pool,
    ):
        ready.wait()
        started = time.perf_counter()
        num_tokens = sum(pool.map(_tokenize, [(first, processes) for first in range(processes)], chunksize=1))
        return num_tokens / (time.perf_counter() - started)


def _load(model: Path, file: Path, num_rows: int, ready: Barrier) -> None:
    from transformers import AutoTokenizer

    global _loaded
    tokenizer = AutoTokenizer.from_pretrained(model)
    with file.open() as lines:
        _loaded = tokenizer, [_texts(json.loads(line), tokenizer) for line in islice(lines, num_rows)]
    ready.wait()


def _texts(row: dict[str, Any], tokenizer: Any) -> list[str]:
    """Returns a row's prompt and two completions as texts in the format ChatML."""
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    return [prompt, *(row[name][0]["content"] + "<|im_end|>\n" for name in ("chosen", "rejected"))]


def _tokenize(share: tuple[int, int]) -> int:
    """Tokenizes this process's share of the rows: every `stride`-th row from row `first`. Returns the number of tokens.

    `share` is the pair of `first` and `stride`.
    """
    first, stride = share
    tokenizer, rows = _loaded
    remaining, num_tokens = iter(rows[first::stride]), 0
    while chunk := list(islice(remaining, ROWS_PER_CALL)):
        texts = [text for row in chunk for text in row]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        num_tokens += sum(map(len, encoded.input_ids))
    return num_tokens
