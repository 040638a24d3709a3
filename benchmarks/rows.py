"""The model and the rows of a benchmark, where the caller brings none: random words in dialogue lengths."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 32_000
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def dialogue_pairs(num_pairs: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Conversational rows of about 126 prompt, 41 chosen and 53 rejected tokens, log-normal around them."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)]

    def text(mean: float) -> str:
        return " ".join(rng.choices(words, k=max(1, round(mean * rng.lognormvariate(-0.18, 0.6)))))

    return [
        {
            "prompt": [{"role": "user", "content": text(123)}],
            "chosen": [{"role": "assistant", "content": text(40)}],
            "rejected": [{"role": "assistant", "content": text(52)}],
        }
        for _ in range(num_pairs)
    ]


def save_model(folder: Path, rows: list[dict[str, Any]], *, layers: int = 8, width: int = 512) -> None:
    """A random Llama of 40M parameters, and a tokenizer in which each of the rows' words is about one token."""
    texts = [row[side][0]["content"] for row in rows for side in ("prompt", "chosen", "rejected")]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
