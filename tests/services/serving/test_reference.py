"""Tests the scores of an engine against a plain float32 forward pass of the same rows."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, PreTrainedModel

from services.contract import Score
from tests.services.serving.conftest import MODEL_LENGTH, POLICY, VOCABULARY, Driver, make_adapter

pytestmark = pytest.mark.ray

Rows = tuple[list[list[int]], list[list[int]]]


def rows_of(*lengths: tuple[int, int], seed: int = 0) -> Rows:
    """Returns random prompts and completions of the given lengths."""
    rng = random.Random(seed)
    ids = [[[rng.randrange(VOCABULARY) for _ in range(length)] for length in row] for row in lengths]
    return [prompt for prompt, _ in ids], [completion for _, completion in ids]


def many_rows(count: int) -> Rows:
    rng = random.Random(count)
    return rows_of(*((rng.randint(1, 100), rng.randint(1, 100)) for _ in range(count)), seed=count)


@pytest.fixture(scope="module")
def plain_forward(model_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@torch.inference_mode()
def expected(model: PreTrainedModel, rows: Rows) -> list[Score]:
    scores = []
    for prompt, completion in zip(*rows, strict=True):
        logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        own = logps.gather(1, torch.tensor(completion)[:, None])
        scores.append(Score(own.double().sum().item(), len(completion)))
    return scores


def agree(scores: list[Score], wanted: list[Score]) -> bool:
    same_lengths = [score.num_tokens for score in scores] == [score.num_tokens for score in wanted]
    return same_lengths and [score.logp for score in scores] == pytest.approx(
        [score.logp for score in wanted], abs=1e-3, rel=0
    )


def test_scores_equal_a_plain_forward(driver: Driver, plain_forward: PreTrainedModel) -> None:
    rows = rows_of((1, 1), (1, 2), (2, 1), (30, 1), (1, 90), (64, 64), (17, 130))
    assert agree(driver.score(*rows), expected(plain_forward, rows))


def test_tokens_of_others_are_read_and_not_scored(driver: Driver, plain_forward: PreTrainedModel) -> None:
    (prompt,), (completion,) = rows_of((7, 9))
    head, middle = expected(plain_forward, ([prompt] * 2, [completion[:2], completion[:5]]))
    (whole,) = expected(plain_forward, ([prompt], [completion]))
    wanted = Score(head.logp + whole.logp - middle.logp, 6)
    assert agree(driver.score([prompt] * 2, [completion] * 2, [((2, 5),), ()]), [wanted, whole])


def test_rows_as_long_as_the_model_are_scored(driver: Driver, plain_forward: PreTrainedModel) -> None:
    rows = rows_of((1, MODEL_LENGTH - 1), (MODEL_LENGTH - 1, 1), (100, MODEL_LENGTH - 100))
    assert agree(driver.score(*rows), expected(plain_forward, rows))


def test_more_rows_than_fit_into_the_engine_keep_their_order(driver: Driver, plain_forward: PreTrainedModel) -> None:
    rows = many_rows(150)
    assert agree(driver.score(*rows), expected(plain_forward, rows))


def test_requests_beside_it_do_not_change_scores(
    driver: Driver, plain_forward: PreTrainedModel, client: OpenAI
) -> None:
    rows = many_rows(60)

    def chat(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model=POLICY["model_id"],
            messages=[{"role": "user", "content": "fox"}],
            max_tokens=150,
            seed=seed,
            logprobs=True,
            top_logprobs=3,
            extra_body={"ignore_eos": True},
        )
        assert answer.choices[0].logprobs
        assert answer.choices[0].logprobs.content
        assert all(len(token.top_logprobs) >= 3 for token in answer.choices[0].logprobs.content)
        return answer.choices[0].message.content

    alone = chat(7)
    with ThreadPoolExecutor() as pool:
        beside = [pool.submit(chat, 7) for _ in range(4)]
        scores = driver.score(*rows)
        assert all(answer.result() == alone for answer in beside)
    assert agree(scores, expected(plain_forward, rows))


def test_no_rows_no_scores(driver: Driver) -> None:
    assert driver.score([], []) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            rows_of((1, 1), (MODEL_LENGTH, 1)),
            f"Row 1 of the request, counted from 0, has {MODEL_LENGTH + 1} tokens, but the model takes at most "
            f"{MODEL_LENGTH}",
        ),
        (([[]], [[5]]), "Row 0 of the request, counted from 0, has 0 prompt and 1 completion tokens"),
        (([[5]], [[]]), "Row 0 of the request, counted from 0, has 1 prompt and 0 completion tokens"),
        (([[5]], [[VOCABULARY]]), f"outside the vocabulary of {VOCABULARY}"),
        (([[-1]], [[5]]), f"outside the vocabulary of {VOCABULARY}"),
        (([[5], [5]], [[5]]), "The request has 2 prompts and 1 completions"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(driver: Driver, rows: Rows, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        driver.score(*rows)


def test_a_cancelled_call_leaves_the_engine_free(driver: Driver) -> None:
    rows = many_rows(2000)
    started = time.monotonic()
    driver.score(*rows)
    whole = time.monotonic() - started
    driver.cancel(*rows, after_seconds=whole / 10)
    started = time.monotonic()
    driver.score([[5]], [[6]])
    assert time.monotonic() - started < whole / 2


def test_an_adapter_that_vllm_would_ignore_in_part_is_an_error_of_its_own(
    driver: Driver, model_folder: Path, tmp_path: Path
) -> None:
    folder = make_adapter(model_folder, tmp_path / "adapter")
    adapter = {"id": "ft:stacked", "source": folder.as_uri()}
    (plain,) = driver.score([[5, 9]], [[200, 31]])
    (adapted,) = driver.score([[5, 9]], [[200, 31]], adapter=adapter | {"id": "ft:plain"})
    assert abs(plain.logp - adapted.logp) > 0.01
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": ["experts.down_proj"]}))
    with pytest.raises(ValueError, match=r"^CannotAttach: .* its config sets target_parameters, .* to 'merged'\.$"):
        driver.score([[5, 9]], [[200, 31]], adapter=adapter)
