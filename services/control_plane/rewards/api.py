"""The route /v1/x/rewards, which returns the rewards of completions."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from dpo_core.data.groups import Group
from services.control_plane.core.documents import answers
from services.control_plane.http.dependencies import SettingsPart, StorePart
from services.control_plane.inference.api import answered, note
from services.control_plane.inference.metering import Meter
from services.control_plane.rewards.documents import RewardsList
from services.control_plane.rewards.judges import Judge, judge_of
from services.control_plane.rewards.preferences import Judged, probabilities, winner
from services.control_plane.rewards.requests import RewardsBody, groups_of
from services.control_plane.rewards.scoring import Judgement, Scoring

router = APIRouter()


@router.post("/x/rewards", responses=answers(RewardsList))
async def create(request: Request, store: StorePart, settings: SettingsPart, body: RewardsBody) -> Response:
    """Scores completions with a policy and its reference model, or with a reward model. The rows are not stored."""
    groups = groups_of(body)
    async with store.begin() as session:
        judge = await judge_of(session, settings, body.model, reference=body.reference, beta=body.beta)
    scoring = cast(Scoring, request.app.state.scoring)
    return await answered(request, _answer(request, scoring, judge, groups))


async def _answer(request: Request, scoring: Scoring, judge: Judge, groups: Sequence[Group]) -> Response:
    def meter_of(model_id: str) -> Meter:
        return Meter(partial(note, request, model_id), shows_usage=True)

    judgement = await scoring.judge(judge, groups, meter_of)
    return await asyncio.to_thread(_response, judge, judgement)  # many completions take a second


def _response(judge: Judge, judgement: Judgement) -> Response:
    return JSONResponse(
        {
            "object": "list",
            "model": judge.model.id,
            "reference": judge.reference and judge.reference.id,
            "beta": judge.beta,
            "data": [_rewards_object(number, judged) for number, judged in enumerate(judgement.groups)],
            "usage": {"prompt_tokens": judgement.num_tokens, "total_tokens": judgement.num_tokens},
        }
    )


def _rewards_object(number: int, judged: Sequence[Judged]) -> dict[str, Any]:
    completions = [
        {"index": i, **asdict(each), "probability": probability}
        for i, (each, probability) in enumerate(zip(judged, probabilities(judged), strict=True))
    ]
    return {"object": "rewards", "index": number, "winner": winner(judged), "completions": completions}
