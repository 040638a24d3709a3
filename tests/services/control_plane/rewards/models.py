"""In Ray Serve's place: models behind HTTP that score as their applications do, in plain torch instead of vLLM."""

import asyncio
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import httpx
from fastapi import FastAPI, Request, Response
from transformers import PreTrainedModel

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.adapter_folder import is_adapter
from dpo_core.models.model import load_merged, load_policy, load_reward_model
from dpo_core.policy.scorer import Scorer, score_reference
from services.serving.reward_model import Rewards
from services.serving.scoring import Score, Scoring
from tests.services.control_plane.conftest import FakeRay
from tests.services.serving.conftest import MODEL_LENGTH


def models_of(fake_ray: FakeRay) -> FastAPI:
    """The HTTP server of all applications that the control plane has told `fake_ray` to serve."""
    app = FastAPI()

    @app.post("/{name}/v1/score/{kind}")
    async def answer(name: str, request: Request) -> Response:
        deployment = fake_ray.serve[name]["deployed_app_config"]["args"]
        application = _application(deployment["source"], deployment["num_outputs"])
        return await _pass_on(application, request)

    return app


@cache
def _application(source: str, num_outputs: int) -> FastAPI:
    app, folder = FastAPI(), Path(source.removeprefix("file://"))
    Scoring(folder, MODEL_LENGTH, _rewards(folder, num_outputs) if num_outputs else _logps(folder)).add_to(app)
    return app


def _rewards(folder: Path, num_outputs: int) -> Score:
    return Rewards(Scorer(load_reward_model(folder, num_outputs=num_outputs)), num_outputs).score


def _logps(folder: Path) -> Score:
    model = policy_of(folder)

    async def score(groups: Sequence[EncodedGroup]) -> list[list[list[float]]]:
        scored = await asyncio.to_thread(score_reference, model, groups, max_tokens_per_pack=512)
        return [[[logp] for logp in group.ref_logps or ()] for group in scored]

    return score


def policy_of(folder: Path) -> PreTrainedModel:
    """The policy in the folder, whole. `score_reference` would turn an adapter off."""
    return load_merged(folder) if is_adapter(folder) else load_policy(folder)


async def _pass_on(app: FastAPI, request: Request) -> Response:
    headers, path = {"content-type": "application/json"}, request.url.path.split("/", 2)[2]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://model") as client:
        answer = await client.post(f"/{path}", content=await request.body(), headers=headers)
    return Response(answer.content, answer.status_code, media_type="application/json")
