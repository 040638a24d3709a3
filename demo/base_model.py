"""Makes a base model with random weights and with a tokenizer that is trained on the caller's text."""

from collections.abc import Iterable
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_base_model(
    folder: Path,
    text: Iterable[str],
    *,
    hidden_size: int,
    num_layers: int,
    vocabulary: int | None = None,
    seed: int = 0,
) -> int:
    """Writes a Hugging Face model to `folder`: a Llama with random weights, which depend on `seed`, a tokenizer that is
    trained on `text`, and a chat template. `hidden_size` and `num_layers` are the Llama's sizes.

    Returns the number of weights. The Llama has `vocabulary` embeddings; if `vocabulary` is None, it has one embedding
    for each token of the tokenizer.
    """
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        text,
        vocab_size=vocabulary or 2048,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )
    torch.manual_seed(seed)
    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary or len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 8 // 3,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 64,
            initializer_range=hidden_size**-0.5,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return policy.num_parameters()
