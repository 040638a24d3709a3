import pytest
import torch

from dpo_core.batch import collate
from dpo_core.config import Dpo, Supervised
from dpo_core.encode import EncodedGroup
from dpo_core.metrics import MEASURES

GROUPS = [EncodedGroup([1], ([2, 3], [4]), (-5.0, -7.0), 1), EncodedGroup([1], ([2], [4]), (-1.0, -1.0), 2)]
TOKEN_LOGPS = torch.tensor([-1.0, -2.0, -9.0, -3.0, -1.5])
CORRECT = torch.tensor([True, False, True, False, False])


def test_dpo_sums_rewards_margins_and_logps_over_pairs():
    keys, measure = MEASURES["dpo"]
    sums = dict(zip(keys, measure(Dpo(beta=0.5), collate(GROUPS), TOKEN_LOGPS, CORRECT).tolist(), strict=True))
    assert sums == {
        "rewards/chosen": pytest.approx(0.5 * (2 - 2)),
        "rewards/rejected": pytest.approx(0.5 * (-2 - 0.5)),
        "rewards/margins": pytest.approx(0.5 * (4 - 1.5)),
        "rewards/accuracies": 1,
        "logps/chosen": -6,
        "logps/rejected": -10.5,
    }


def test_swapping_chosen_and_rejected_negates_margins():
    keys, measure = MEASURES["dpo"]
    swapped = [EncodedGroup(g.prompt_ids, g.completion_ids[::-1], g.ref_logps[::-1], g.line) for g in GROUPS]
    margins = keys.index("rewards/margins")
    before = measure(Dpo(), collate(GROUPS), TOKEN_LOGPS, CORRECT)[margins]
    after = measure(Dpo(), collate(swapped), TOKEN_LOGPS[[2, 0, 1, 4, 3]], CORRECT)[margins]
    assert after == -before


def test_supervised_counts_tokens_that_were_the_likeliest():
    keys, measure = MEASURES["supervised"]
    assert keys == ("mean_token_accuracy",)
    assert measure(Supervised(), collate(GROUPS), TOKEN_LOGPS, CORRECT).tolist() == [2]
