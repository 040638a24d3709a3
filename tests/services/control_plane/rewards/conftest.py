"""Provides trained models in the database, and an HTTP server in place of Ray Serve that scores with them.

The server scores as the models' applications do, but with plain torch in place of vLLM.
"""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from transformers import PreTrainedModel

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.data.groups import Group
from dpo_core.encoding.encode import EncodedGroup, encode_group
from dpo_core.models.adapter_folder import is_adapter
from dpo_core.models.model import load_merged, load_policy, load_reward_model, load_tokenizer
from dpo_core.options import Dpo, Objective, RewardBradleyTerry, Simpo
from dpo_core.policy.scorer import Scorer, score_reference
from dpo_core.training.trainer import train
from services.contract import JobSpec, Weights
from services.control_plane.settings import BaseModel, Settings
from services.serving.reward_model import Rewards
from services.serving.scoring import Score, Scoring
from tests.services.control_plane.conftest import FakeRay, free_port
from tests.services.serving.conftest import MODEL_LENGTH, make_model
from tests.services.serving.test_scoring import TEMPLATE

BETA = 0.3
ASKED: list[str] = []  # the models that scored something, in order
PAIR = Group("the quick", (" brown fox", " lazy dog"), 1)


def models_of(fake_ray: FakeRay) -> FastAPI:
    """Returns the HTTP server for all applications that the control plane has told `fake_ray` to serve."""
    app = FastAPI()

    @app.post("/{name}/v1/score/{kind}")
    async def answer(name: str, request: Request) -> Response:
        if name not in fake_ray.serve:  # it has just been removed
            return Response(status_code=503)
        deployment = fake_ray.serve[name]["deployed_app_config"]["args"]
        ASKED.append(deployment["model_id"])
        application = _application(deployment["source"], deployment["num_outputs"])
        return await _pass_on(application, request)

    return app


@cache
def _application(source: str, num_outputs: int) -> FastAPI:
    app, folder = FastAPI(), Path(source.removeprefix("file://"))
    Scoring(str(folder), MODEL_LENGTH, _rewards(folder, num_outputs) if num_outputs else _logps(folder)).add_to(app)
    return app


def _rewards(folder: Path, num_outputs: int) -> Score:
    return Rewards(Scorer(load_reward_model(folder, num_outputs=num_outputs)), num_outputs).score


def _logps(folder: Path) -> Score:
    model, one_at_a_time = policy_of(folder), asyncio.Lock()

    async def score(groups: Sequence[EncodedGroup]) -> list[list[list[float]]]:
        async with one_at_a_time:
            scored = await asyncio.to_thread(score_reference, model, groups, max_tokens_per_pack=512)
        return [[[logp] for logp in group.ref_logps or ()] for group in scored]

    return score


def policy_of(folder: Path) -> PreTrainedModel:
    """Loads the policy in the folder, and merges an adapter into it. `score_reference` would turn an adapter off."""
    return load_merged(folder) if is_adapter(folder) else load_policy(folder)


async def _pass_on(app: FastAPI, request: Request) -> Response:
    headers, path = {"content-type": "application/json"}, request.url.path.split("/", 2)[2]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://model") as client:
        answer = await client.post(f"/{path}", content=await request.body(), headers=headers)
    return Response(answer.content, answer.status_code, media_type="application/json")


@dataclass
class Trained:
    """Holds the folders of models that jobs have trained from the base model `tiny`."""

    base: Path
    other: Path  # a model of another vocabulary
    folders: dict[str, Path]

    def __getitem__(self, name: str) -> Path:
        return self.folders[name]


def trained(base: Path, folder: Path, objective: Objective, **options: Any) -> Path:
    """Trains a model for four large steps, and returns its folder."""
    load = load_reward_model if objective.traits.num_outputs else load_policy
    model, tokenizer = load(base, **options), load_tokenizer(base)
    groups = score_reference(load_policy(base), [encode_group(PAIR, tokenizer)], max_tokens_per_pack=512)
    config = TrainConfig(
        objective=objective, optim=Optim(learning_rate=1e-2), n_epochs=4, batch_size=1, checkpoint_steps=4
    )
    for _ in train(config, model, tokenizer, [groups] * 4, total_steps=4, checkpoint_dir=folder):
        pass
    return folder / "step-000004" / "model"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("models")
    base, other = make_model(folder / "base", TEMPLATE), make_model(folder / "other", TEMPLATE)
    tokenizer = load_tokenizer(other)
    tokenizer.add_tokens(["pangolin"])
    tokenizer.save_pretrained(other)
    return Trained(
        base,
        other,
        {
            "dpo": trained(base, folder / "dpo", Dpo(beta=BETA)),
            "adapter": trained(base, folder / "adapter", Dpo(beta=BETA), adapter=Lora(r=4)),
            "simpo": trained(base, folder / "simpo", Simpo()),
            "reward": trained(base, folder / "reward", RewardBradleyTerry()),
        },
    )


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay, models: Trained) -> Iterator[Settings]:
    server = uvicorn.Server(uvicorn.Config(models_of(fake_ray), port=free_port(), log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    urls = {
        "ray_url": f"http://127.0.0.1:{fake_ray.server.server_port}",
        "serve_url": f"http://127.0.0.1:{server.config.port}",
        "model_wait_seconds": 20.0,
        "max_loaded_models": 10,
    }
    bases = {"tiny": BaseModel(source=str(models.base)), "other": BaseModel(source=str(models.other))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.control_plane.tenants.usage.FLUSH_SECONDS", 0.1)
        yield offline.model_copy(update={**urls, "models": bases})
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def rows(base_url: str, settings: Settings, models: Trained) -> None:
    """Adds the trained models and their jobs to the database."""
    objectives = {"dpo": Dpo(beta=BETA), "adapter": Dpo(beta=BETA), "simpo": Simpo(), "reward": RewardBradleyTerry()}
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        for name, objective in objectives.items():
            add(connection, name, models[name], objective, "tiny", models.base)


def add(rows: psycopg.Connection, name: str, folder: Path, objective: Objective, start: str, source: Path) -> None:
    weights = Weights(adapter=Lora(r=4) if name == "adapter" else None)
    spec = JobSpec(model=start, training_file="file-1", config=TrainConfig(objective=objective), weights=weights)
    columns = "id, spec, model_source, fine_tuned_model, project_id, model_root, priority, desired, observed, version"
    values = "%s, %s, %s, %s, 'proj_default', 'tiny', 0, 'run', 'succeeded', 1"
    job = (f"ftjob-{name}", spec.model_dump_json(), str(source), f"ft:tiny:raydpo::{name}")
    rows.execute(f"INSERT INTO jobs ({columns}, finished_at) VALUES ({values}, now())", job)
    columns = "id, project_id, source, root, job_id, num_outputs"
    model = (f"ft:tiny:raydpo::{name}", folder.as_uri(), f"ftjob-{name}", objective.traits.num_outputs)
    rows.execute(f"INSERT INTO models ({columns}) VALUES (%s, 'proj_default', %s, 'tiny', %s, %s)", model)
