"""Tests the reference's scores by the trainer's own forward pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_core.encoding.encode import EncodedGroup
from services.contract import AttemptSpec
from services.training.reference.trainer_scores import check_reference, token_logps, tokens_per_second
from services.training.reports.reporting import JobFailed

MakeSpec = Callable[..., AttemptSpec]


def test_a_reference_that_takes_fewer_tokens_than_the_rows_may_have_is_refused(
    make_spec: MakeSpec, other_model_source: str, tmp_path: Path
) -> None:
    shutil.copytree(other_model_source, tmp_path / "short")
    file = tmp_path / "short" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 64}))
    spec = make_spec(reference_model_source=str(tmp_path / "short"))
    check_reference(spec, 64)
    with pytest.raises(JobFailed) as refused:
        check_reference(spec, 65)
    failed = refused.value.report
    assert (failed.code, failed.param) == ("reference_mismatch", "x_raydpo.reference.model")
    assert failed.message == (
        "The reference model takes only 64 tokens, but rows of this job may have 65; "
        "set x_raydpo.max_length to 64, or choose another reference model."
    )


GROUPS = [
    EncodedGroup([1, 5, 6, 2], ([7, 8, 0], [9, 0]), None, line=1),
    EncodedGroup([1, 9, 2], ([5, 0], [6, 7]), None, line=2),
]


def test_a_token_s_score_is_that_of_a_plain_forward_pass(make_spec: MakeSpec, model_source: str) -> None:
    found = token_logps(make_spec(), GROUPS)
    model = AutoModelForCausalLM.from_pretrained(model_source, dtype=torch.float32)
    for group, logps in zip(GROUPS, found, strict=True):
        for ids, of_completion in zip(group.completion_ids, logps, strict=True):
            row = torch.tensor([[*group.prompt_ids, *ids]])
            with torch.no_grad():
                plain = model(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
            assert of_completion == pytest.approx(plain[len(group.prompt_ids) - 1 :].tolist(), abs=1e-5)


def test_the_speed_is_that_of_all_tokens_of_the_groups(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((10.0, 12.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert tokens_per_second(make_spec(), GROUPS) == sum(group.num_tokens for group in GROUPS) / 2


def test_the_same_model_is_a_reference_and_one_with_another_tokenizer_is_none(
    make_spec: MakeSpec, byte_level_model: str
) -> None:
    check_reference(make_spec(), 128)
    with pytest.raises(JobFailed, match="another tokenizer than the model that the job trains"):
        check_reference(make_spec(reference_model_source=byte_level_model), 2)
