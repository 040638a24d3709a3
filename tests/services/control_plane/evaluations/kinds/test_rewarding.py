"""Tests how many stages a reward takes. That the rewards are those that clients get is tested with the kinds that use
them.
"""

from services.control_plane.evaluations.kinds.rewarding import num_stages
from services.control_plane.models.models import STARTED_AT, NamedModel
from services.control_plane.rewards.judges import Judge

MODEL = NamedModel("m", "/m", "m", STARTED_AT)


def test_each_model_has_a_stage_of_its_own() -> None:
    assert num_stages(Judge(MODEL)) == 1
    assert num_stages(Judge(MODEL, MODEL, 0.1)) == 2
