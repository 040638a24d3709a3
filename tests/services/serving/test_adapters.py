"""Tests LoRA adapters on the running vLLM engines of their base model, over HTTP."""

import asyncio
import gc
import json
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psutil
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dpo_core.config import Lora
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.adapter import BASE, fingerprint
from dpo_core.models.adapter_folder import EFFECT, WEIGHTS, is_adapter
from dpo_core.models.model import load_policy, load_tokenizer
from dpo_core.policy.adapter_effect import Effect, measure_effect
from dpo_core.policy.scorer import Scorer
from services import storage
from services.contract import Adapter, Deployment
from services.serving.engine_args import engine_args
from tests.services.s3 import S3
from tests.services.serving.conftest import LORA, SIZES, Serving, make_adapter

pytestmark = pytest.mark.ray

PROMPT = [5, 9, 200, 31, 77]
NUM_ADAPTERS = 6
QWEN = {"app_name": "qwen", "model_id": "qwen"}


@pytest.fixture(scope="module")
def qwen_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(1)
    Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)).save_pretrained(folder)
    load_tokenizer(model_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("adapters")
    return [make_adapter(qwen_folder, home / f"adapter-{seed}", seed=seed) for seed in range(NUM_ADAPTERS)]


@pytest.fixture(scope="module")
def qwen(serving: Serving, qwen_folder: Path) -> Iterator[Serving]:
    """Serves two replicas of one base model during a test."""
    engine = LORA | {"replicas": 2}
    serving.deploy(QWEN | {"engine": engine, "source": str(qwen_folder), "dtype": "float32"})
    serving.wait(lambda apps: apps["qwen"]["status"] == "RUNNING")
    yield serving
    serving.remove("qwen")


@pytest.fixture(scope="module")
def likeliest(folders: list[Path]) -> list[float]:
    """Returns the log-probability of the likeliest next token for each adapter, from PEFT's own forward pass."""
    return [forward(folder) for folder in folders]


@torch.inference_mode()
def forward(folder: Path) -> float:
    loader = AutoPeftModelForCausalLM if is_adapter(folder) else AutoModelForCausalLM
    logits = loader.from_pretrained(folder)(input_ids=torch.tensor([PROMPT])).logits
    return float(logits[0, -1].log_softmax(-1).max())


def headers_of(adapter_id: str, folder: Path) -> dict[str, str]:
    return {"x-raydpo-adapter": quote(adapter_id), "x-raydpo-adapter-source": quote(folder.as_uri())}


def ask(serving: Serving, adapter_id: str, folder: Path, **change: Any) -> httpx.Response:
    return complete(serving, {"model": adapter_id} | change, headers_of(adapter_id, folder))


def ask_base(serving: Serving) -> httpx.Response:
    return complete(serving, {"model": "qwen"}, {})


def complete(
    serving: Serving, change: dict[str, Any], headers: dict[str, str], app_name: str = "qwen"
) -> httpx.Response:
    body = {"prompt": PROMPT, "max_tokens": 1, "logprobs": 1, "temperature": 0} | change
    return httpx.post(f"{serving.route(app_name)}/v1/completions", json=body, headers=headers, timeout=60)


def logp(answer: httpx.Response) -> float:
    assert answer.status_code == 200, answer.text
    (likeliest,) = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    return float(likeliest)


def pids(serving: Serving) -> set[int]:
    return {replica["pid"] for replica in serving.status()["qwen"]["deployments"]["policy"]["replicas"]}


def test_an_older_vllm_is_refused_because_it_mixes_adapters_up() -> None:
    from services.serving.adapters import check_version

    check_version("0.29.0")
    with pytest.raises(RuntimeError, match="or newer, or set max_lora_rank to 0"):
        check_version("0.28.1")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # in vLLM's own code
def test_copies_and_engine_shrink_to_the_limit_and_keep_nothing_of_a_deleted_adapter(
    qwen_folder: Path, folders: list[Path], s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.engine.async_llm import AsyncLLM

    from services.serving.adapters import Adapters
    from services.serving.reference import Reference

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    bucket = s3.new_folder()
    found = [Adapter(id=f"ft:{number}", source=storage.join(bucket, str(number))) for number in range(NUM_ADAPTERS)]
    for adapter, folder in zip(found, folders, strict=True):
        storage.publish(folder, adapter.source)
    deployment = Deployment(**QWEN, source=str(qwen_folder), dtype="float32", engine=LORA)

    async def story() -> None:
        arguments = AsyncEngineArgs(model=str(qwen_folder), **engine_args(deployment, on_cpus=True))
        engine = AsyncLLM.from_engine_args(arguments)
        try:
            models = OpenAIServingModels(engine, [BaseModelPath(name="qwen", model_path=str(qwen_folder))])
            reference = Reference(engine, max_tokens_in_flight=4096)
            adapters = Adapters(engine, models, reference, str(qwen_folder))

            async def kept() -> tuple[set[str], int, set[int]]:
                """Returns the attached adapters, the number of local copies, and the ids that the engine holds."""
                while adapters._detaching:
                    await asyncio.gather(*adapters._detaching)
                ids = {request.lora_int_id for request in models.lora_requests.values()}
                held = set(await engine.list_loras())
                assert held == ids
                return set(models.lora_requests), len(list(adapters._folder.glob(f"*/**/{WEIGHTS}"))), held

            for adapter in found:
                async with adapters.using(adapter):
                    pass
            names, copies, held = await kept()
            assert (names, copies, len(held)) == ({"ft:2", "ft:3", "ft:4", "ft:5"}, 4, 4)
            adapters.forget_deleted(["ft:4", "ft:0"])
            names, copies, after = await kept()
            assert (names, copies) == ({"ft:2", "ft:3", "ft:5"}, 3)
            assert after < held
        finally:
            engine.shutdown()

    asyncio.run(story())
    gc.collect()  # vLLM leaves its sockets to the garbage collector, which warns of them


def test_each_adapter_and_the_base_answer_as_in_peft_under_load(
    qwen: Serving, qwen_folder: Path, folders: list[Path], likeliest: list[float]
) -> None:
    """Six adapters and their base are asked in turn by several threads; four adapters can stay attached, and two fit
    into one step, beside the base."""
    expected = [*likeliest, forward(qwen_folder)]
    numbers = [number % len(expected) for number in range(210)]

    def answer(number: int) -> httpx.Response:
        return ask(qwen, f"ft:load:{number}", folders[number]) if number < NUM_ADAPTERS else ask_base(qwen)

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(answer, numbers))
    assert [logp(answer) for answer in answers] == pytest.approx([expected[it] for it in numbers], abs=1e-4)


def changed(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], object], base: str = "") -> Path:
    """Writes a copy of the adapter with changed weights to `to`, and returns it.

    If `base` is not empty, it becomes the fingerprint of the adapter's base model.
    """
    shutil.copytree(folder, to)
    weights = load_file(to / WEIGHTS)
    change(weights)
    save_file(weights, to / WEIGHTS, {"format": "pt"})
    if base:
        (to / BASE).write_text(json.dumps({"sha256_of_samples": base}))
    return to


def test_an_adapter_of_other_weights_than_the_bases_is_refused(
    qwen: Serving, folders: list[Path], qwen_folder: Path, likeliest: list[float], tmp_path: Path
) -> None:
    same = changed(folders[0], tmp_path / "same", len, fingerprint(load_policy(qwen_folder).requires_grad_(False)))
    other = changed(folders[0], tmp_path / "other", len, "of another base")
    for _ in range(4):  # on both replicas
        assert logp(ask(qwen, "ft:same", same)) == pytest.approx(likeliest[0], abs=1e-4)
        refused = ask(qwen, "ft:other", other)
        assert refused.status_code == 409
        said = refused.json()["error"]["message"]
        assert f"'ft:other': it was trained on a base whose weights differ from those of {qwen_folder}; restore" in said


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in vLLM's own imports
def test_a_base_whose_copy_is_gone_is_fetched_again(
    folders: list[Path], qwen_folder: Path, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.serving.adapters import AdapterRefused, AdapterUnusable, Base

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = storage.join(s3.new_folder(), "qwen")
    storage.publish(qwen_folder, source)
    copy, base = storage.fetch(source), Base(source)
    shutil.rmtree(copy.parent)
    same = changed(folders[0], tmp_path / "same", len, fingerprint(load_policy(qwen_folder).requires_grad_(False)))
    s3.proxy.refusing = True
    s3.proxy.cut()
    with pytest.raises(AdapterRefused, match="cannot be read") as refused:
        base.check(Adapter(id="ft:same", source=str(same)), same)
    assert refused.value.status == 503, "it can be attached later"
    s3.proxy.pass_on()
    base.check(Adapter(id="ft:same", source=str(same)), same)
    other = changed(folders[0], tmp_path / "other", len, "of another base")
    with pytest.raises(AdapterUnusable, match="weights differ"):
        base.check(Adapter(id="ft:other", source=str(other)), other)


def test_an_adapter_with_numbers_that_are_not_finite_is_refused_and_one_of_zeros_is_told(
    qwen: Serving, folders: list[Path], tmp_path: Path
) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[max(weights)][0, 0] = torch.nan

    def empty(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            weights[name].mul_(".lora_B." not in name)

    refused = ask(qwen, "ft:spoiled", changed(folders[0], tmp_path / "spoiled", spoil))
    assert refused.status_code == 409
    assert "has NaN or infinite values, such as in base_model.model." in refused.json()["error"]["message"]
    assert ask(qwen, "ft:empty", changed(folders[0], tmp_path / "empty", empty)).status_code == 200
    logs = Path(qwen.head.folder).glob("ray/session_latest/logs/**/*")
    told = b"The adapter 'ft:empty' has learned nothing: it answers as its base model does."
    assert any(told in log.read_bytes() for log in logs if log.is_file())


def with_effect(folder: Path, effect: Effect, to: Path) -> Path:
    shutil.copytree(folder, to)
    (to / EFFECT).write_bytes(effect.to_json())
    return to


def test_an_adapter_without_its_effect_on_its_training_rows_is_refused_with_the_numbers(
    qwen: Serving, qwen_folder: Path, folders: list[Path], likeliest: list[float], tmp_path: Path
) -> None:
    def empty(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            weights[name].mul_(".lora_B." not in name)

    trained = load_policy(qwen_folder, adapter=folders[0])
    rows = [EncodedGroup(PROMPT, (list(range(20 + at, 40 + 3 * at)),), None, at) for at in range(4)]
    effect = measure_effect(Scorer(trained), rows, max_tokens_per_pack=1024)
    assert effect.largest > 1
    good = with_effect(folders[0], effect, tmp_path / "good")
    without = with_effect(changed(folders[0], tmp_path / "emptied", empty), effect, tmp_path / "without")
    another = with_effect(folders[1], effect, tmp_path / "another")
    for _ in range(4):  # on both replicas
        assert logp(ask(qwen, "ft:good", good)) == pytest.approx(likeliest[0], abs=1e-4)
        for name, folder in (("ft:without", without), ("ft:another", another)):
            refused = ask(qwen, name, folder)
            assert refused.status_code == 409
            error = refused.json()["error"]
            assert error["code"] == "adapter_unusable"
            said = f"does not compute with the adapter '{name}': it changes the log-probability of one of its training "
            assert said in error["message"]
            assert error["message"].endswith("may be between them; set the mode of its deployment to 'merged'.")
    assert "rows by 0 nats here, but by " in ask(qwen, "ft:without", without).json()["error"]["message"]


def test_fifty_first_requests_at_once_all_get_an_answer(
    qwen: Serving, folders: list[Path], likeliest: list[float]
) -> None:
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda _: ask(qwen, "ft:fifty", folders[0]), range(50)))
    assert [logp(answer) for answer in answers] == pytest.approx([likeliest[0]] * 50, abs=1e-4)


@pytest.fixture(scope="module")
def mixture(serving: Serving, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Serves a mixture of experts that is to attach adapters, and returns its folder."""
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(1)
    MixtralForCausalLM(MixtralConfig(**SIZES, head_dim=32, num_local_experts=4)).save_pretrained(folder)
    load_tokenizer(model_folder).save_pretrained(folder)
    serving.deploy(
        {"app_name": "mixture", "model_id": "mixture", "engine": LORA, "source": str(folder), "dtype": "float32"}
    )
    serving.wait(lambda apps: apps["mixture"]["status"] == "RUNNING")
    yield folder
    serving.remove("mixture")


def test_on_cpus_a_mixture_of_experts_answers_and_attaches_no_adapters(
    serving: Serving, mixture: Path, tmp_path: Path
) -> None:
    folder = make_adapter(mixture, tmp_path / "adapter", adapter=Lora(r=4, target_modules=("q_proj",)))
    assert logp(complete(serving, {"model": "mixture"}, {}, "mixture")) == pytest.approx(forward(mixture), abs=1e-4)
    refused = complete(serving, {"model": "ft:1"}, headers_of("ft:1", folder), "mixture")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_unusable")
    assert refused.json()["error"]["message"].endswith("takes no adapters; set the mode of its deployment to 'merged'.")


def stream(serving: Serving, adapter_id: str, folder: Path, answered: Counter[int], errors: dict[int, str]) -> None:
    """Streams answers one after the other, because a small model ends each of them soon. Counts those that are whole,
    and keeps the first error, under this thread's number."""
    number = threading.get_ident()
    body = {"model": adapter_id, "prompt": PROMPT, "max_tokens": 240, "stream": True, "ignore_eos": True}
    url, headers = f"{serving.route('qwen')}/v1/completions", headers_of(adapter_id, folder)
    while number not in errors:
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
            last = answer.read().decode() if answer.status_code != 200 else [*answer.iter_lines()][-2]
        if "error" in last:
            errors[number] = last
        else:
            answered[number] += 1


def test_a_deleted_adapter_stops_answering_on_every_replica(
    qwen: Serving, folders: list[Path], likeliest: list[float]
) -> None:
    before, answered, said = pids(qwen), Counter[int](), dict[int, str]()
    arguments = (qwen, "ft:gone", folders[1], answered, said)
    threads = [threading.Thread(target=stream, args=arguments, daemon=True) for _ in range(12)]
    for thread in threads:
        thread.start()
    qwen.wait(lambda _: len(answered) == 12)
    assert not said
    qwen.delete_adapter("ft:gone")
    for thread in threads:
        thread.join(300)
    assert len(said) == 12
    errors = [json.loads(each.removeprefix("data: "))["error"] for each in said.values()]
    assert {error["code"] for error in errors} == {"model_not_found"}
    answers = [ask(qwen, "ft:gone", folders[1]) for _ in range(8)]
    assert {answer.status_code for answer in answers} == {404}
    assert logp(ask(qwen, "ft:stays", folders[1])) == pytest.approx(likeliest[1], abs=1e-4)
    assert pids(qwen) == before
    assert len(before) == 2


def test_other_clients_get_answers_while_a_replica_dies(
    qwen: Serving, folders: list[Path], likeliest: list[float]
) -> None:
    """Requests to the dead replica fail. The new replica attaches the adapter again, but no deleted adapter."""
    said: list[httpx.Response] = []
    ended = threading.Event()

    def ask_on() -> None:
        while not ended.is_set():
            with suppress(httpx.RemoteProtocolError):
                said.append(ask(qwen, "ft:dies", folders[2], max_tokens=40))

    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(ask_on) for _ in range(8)]
        qwen.wait(lambda _: len(said) >= 40)
        psutil.Process(next(iter(pids(qwen)))).kill()
        before = len(said)
        qwen.wait(lambda _: len(said) >= before + 120)
        ended.set()
        for client in running:
            client.result()
    whole = [answer for answer in said if answer.status_code == 200]
    assert {answer.status_code for answer in said} <= {200, 500, 503}
    assert all(("x-request-id" in answer.headers) == (answer.status_code != 500) for answer in said)
    assert len(whole) > len(said) - 16
    firsts = [answer.json()["choices"][0]["logprobs"]["token_logprobs"][0] for answer in whole]
    assert firsts == pytest.approx([likeliest[2]] * len(whole), abs=1e-4)
    qwen.wait(lambda apps: len(healthy(apps)) == 2)
    assert {ask(qwen, "ft:gone", folders[1]).status_code for _ in range(8)} == {404}
    assert [logp(ask(qwen, "ft:dies", folders[2])) for _ in range(8)] == pytest.approx([likeliest[2]] * 8, abs=1e-4)


def healthy(apps: dict[str, Any]) -> list[int]:
    replicas = apps["qwen"]["deployments"]["policy"]["replicas"]
    return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING"]
