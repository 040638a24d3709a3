"""Makes the inputs of `data_plane.py`: a file of preference pairs, and a model folder with a tokenizer."""

import json
import random
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

NUM_WORDS = 40_000
PROMPT, CHOSEN, REJECTED = 60, 30, 40  # mean numbers of words; with the JSON syntax, a row has about 1 KB
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|im_end|>", "<|im_start|>"]
VOCABULARY = 32_000


def write_pairs(file: Path, num_rows: int, *, seed: int = 0) -> None:
    with file.open("w") as output:
        output.writelines(pairs(num_rows, seed=seed))


def pairs(num_rows: int, *, seed: int = 0) -> Iterator[str]:
    """Yields `num_rows` lines of JSON, each with a prompt, a chosen and a rejected answer, made of random words.

    The words are numbered, and word n is n times rarer than word 1.
    """
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(NUM_WORDS)]
    cumulative = list(accumulate(1 / rank for rank in range(1, NUM_WORDS + 1)))
    rng.seed(seed)

    def message(role: str, mean: float) -> list[dict[str, str]]:
        count = max(1, round(mean * rng.lognormvariate(-0.18, 0.6)))
        return [{"role": role, "content": " ".join(rng.choices(words, cum_weights=cumulative, k=count))}]

    for _ in range(num_rows):
        row = {"prompt": message("user", PROMPT), "chosen": message("assistant", CHOSEN)}
        yield json.dumps(row | {"rejected": message("assistant", REJECTED)}) + "\n"


def save_tokenizer(folder: Path, *, num_rows: int) -> None:
    """Saves a model folder without weights: a tokenizer, the chat template ChatML and a Llama's configuration.

    The tokenizer is a byte-level BPE with 32,000 tokens, trained on `num_rows` rows.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(_texts(num_rows), vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", chat_template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **sizes).save_pretrained(folder)


def _texts(num_rows: int) -> Iterator[str]:
    for line in pairs(num_rows, seed=1):
        row = json.loads(line)
        for messages in (row["prompt"], row["chosen"], row["rejected"]):
            yield messages[0]["content"]
