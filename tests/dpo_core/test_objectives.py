import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_core.batch import collate
from dpo_core.config import Dpo, Supervised
from dpo_core.encode import EncodedGroup
from dpo_core.objectives import OBJECTIVES, check_groups, dpo, supervised

PAIR = EncodedGroup([1], ([2, 3], [4]), (-5.0, -7.0), 1)
LOGPS = st.floats(-50, -0.01)


def loss_of(group: EncodedGroup, chosen: float, rejected: float, beta: float) -> float:
    token_logps = torch.tensor([chosen / 2, chosen / 2, rejected], dtype=torch.float64)
    return dpo(Dpo(beta=beta), collate([group]), token_logps).item()


@given(chosen=LOGPS, rejected=LOGPS, beta=st.floats(0.01, 2))
def test_dpo_is_equation_7(chosen, rejected, beta):
    delta = (chosen + 5) - (rejected + 7)
    expected = math.log1p(math.exp(-beta * delta)) if beta * delta > -700 else -beta * delta
    assert loss_of(PAIR, chosen, rejected, beta) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(chosen=LOGPS, rejected=LOGPS)
def test_dpo_of_a_policy_that_equals_its_reference_is_ln_2(chosen, rejected):
    token_logps = torch.tensor([chosen / 2, chosen / 2, rejected], dtype=torch.float32)
    sums = ((token_logps[0] + token_logps[1]).item(), token_logps[2].item())
    batch = collate([replace(PAIR, ref_logps=sums)])
    assert dpo(Dpo(), batch, token_logps).item() == pytest.approx(math.log(2))


def test_supervised_is_the_negative_log_likelihood_of_each_token():
    token_logps = torch.tensor([-1.0, -2.0])
    assert supervised(Supervised(), collate([PAIR]), token_logps).tolist() == [1, 2]


def test_units_are_tokens_for_supervised_and_groups_for_dpo():
    assert OBJECTIVES["supervised"].count_units([PAIR, PAIR]) == 6
    assert OBJECTIVES["dpo"].count_units([PAIR, PAIR]) == 2


def test_a_group_of_the_wrong_size_is_refused_by_line():
    with pytest.raises(ValueError, match="Line 1 has 2 completions; supervised takes 1"):
        check_groups(Supervised(), [PAIR])


def test_a_pair_without_reference_is_refused_by_line():
    with pytest.raises(ValueError, match="Line 1 has no ref_logps; score it"):
        check_groups(Dpo(), [replace(PAIR, ref_logps=None)])
