import torch

from demo.base_model import make_base_model
from demo.rows import Shop
from dpo_core.data.groups import Group
from dpo_core.encoding.encode import encode_group
from dpo_core.models.model import load_policy, load_tokenizer


def test_base_model_is_a_folder_the_service_reads_and_its_template_is_a_prefix(tmp_path):
    rows = list(Shop(num_things=10, num_held_out=8).demonstrations(200))
    weights = make_base_model(tmp_path, [text for row in rows for text in row], hidden_size=128, num_layers=2)
    policy, tokenizer = load_policy(tmp_path), load_tokenizer(tmp_path)
    assert weights == sum(parameter.numel() for parameter in policy.parameters())
    prompt = [{"role": "user", "content": rows[0][0]}]
    encoded = encode_group(Group(prompt, ([{"role": "assistant", "content": rows[0][1]}],), line=1), tokenizer)
    assert tokenizer.decode(encoded.completion_ids[0]) == f"{rows[0][1]}<|end|>"
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([list(encoded.prompt_ids)])).logits
    assert logits.shape == (1, len(encoded.prompt_ids), len(tokenizer))
