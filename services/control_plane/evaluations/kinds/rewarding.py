"""Computes the rewards of an item's completions (an item is a prompt) stage by stage: each stage asks one model only.

A reward model needs one stage. The implicit reward of a policy needs two: one for the policy, one for its reference.
"""

from dpo_core.data.groups import Group
from services.contract import Scored
from services.control_plane.evaluations.kinds.asking import Models
from services.control_plane.evaluations.kinds.kind import Found
from services.control_plane.rewards.judges import Judge
from services.control_plane.rewards.preferences import Judged
from services.control_plane.rewards.scoring import explicit_rewards, implicit_rewards


def num_stages(judge: Judge) -> int:
    return 1 if judge.reference is None else 2


async def reward(
    judge: Judge, stage: int, group: Group, found: Found, models: Models
) -> tuple[Found, list[Judged] | None]:
    """Does one stage of computing the rewards of the completions of `group` (a prompt with completions).

    `judge` names the models that compute the rewards, and `models` sends requests to them. `stage` counts from 0, and
    `found` holds the results of earlier stages for this group. Returns a pair:

    - the results to store for the next stage, as a JSON object
    - the reward of each completion; None before the last stage
    """
    if stage == 0:
        scored = await models.scoring.score_texts(judge.model, [group], models.meter_of, today=judge.today)
        if judge.reference is not None:
            return {"scored": scored.model_dump(mode="json")}, None
        return {"scored": None}, explicit_rewards(scored)[0]
    scored = Scored.model_validate(found["scored"])
    assert judge.reference is not None
    assert judge.beta is not None
    reference = await models.scoring.score_tokens(judge.reference, scored.groups, scored.vocabulary, models.meter_of)
    return {"scored": None}, implicit_rewards(judge.beta, scored, reference)[0]
