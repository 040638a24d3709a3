import pytest
import torch

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.objectives.metrics import compute_metrics
from dpo_core.options import Dpo, Kto, Supervised
from dpo_core.policy.measures import Measures

GROUPS = [EncodedGroup([1], ([2, 3], [4]), (-5.0, -7.0), 1), EncodedGroup([1], ([2], [4]), (-1.0, -1.0), 2)]
FOUND = torch.tensor([[-3.0, -1.0, 1], [-9.0, -9.0, 1], [-3.0, -3.0, 0], [-1.5, -1.5, 0]])


def values(objective, groups, found) -> dict[str, float]:
    return {key: value.item() for key, value in compute_metrics(objective, Measures(groups, found)).items()}


def test_means_over_pairs():
    assert values(Dpo(beta=0.5), GROUPS, FOUND) == {
        "rewards/chosen": pytest.approx(0.5 * (2 - 2) / 2),
        "rewards/rejected": pytest.approx(0.5 * (-2 - 0.5) / 2),
        "rewards/margins": pytest.approx(0.5 * (4 - 1.5) / 2),
        "rewards/accuracies": 0.5,
        "logps/chosen": -3,
        "logps/rejected": -5.25,
        "lengths/chosen": 1.5,
        "lengths/rejected": 1,
        "logratios/chosen": 0,
        "logratios/rejected": -1.25,
        "kl": pytest.approx(0.625),
    }


def test_swapping_chosen_and_rejected_negates_margins():
    swapped = [EncodedGroup(g.prompt_ids, g.completion_ids[::-1], g.ref_logps[::-1], g.line) for g in GROUPS]
    before = values(Dpo(), GROUPS, FOUND)["rewards/margins"]
    assert values(Dpo(), swapped, FOUND[[1, 0, 3, 2]])["rewards/margins"] == pytest.approx(-before)


def test_rejected_is_the_mean_of_all_but_the_best_and_accuracy_counts_ordered_pairs():
    ranking = EncodedGroup([1], ([2], [3], [4]), (0.0, 0.0, 0.0), 1, ratings=(2.0, 1.0, 1.0))
    found = values(Dpo(beta=1), [ranking], torch.tensor([[-2.0, 0, 0], [-1.0, 0, 0], [-4.0, 0, 0]]))
    assert found["rewards/chosen"] == -2
    assert found["rewards/rejected"] == -2.5
    assert found["rewards/accuracies"] == 0.5  # the tie is no pair


def test_a_side_that_no_completion_is_on_has_no_metrics():
    liked = EncodedGroup([1], ([2], [3]), (0.0, 0.0), 1, ratings=(1.0, float("nan")))
    found = values(Kto(), [liked], torch.tensor([[-2.0, 0, 0], [3.0, 0, 0]]))
    assert found["rewards/chosen"] == pytest.approx(-0.2)
    assert found["kl"] == 3  # of the completion of another prompt
    assert not found.keys() & {"rewards/rejected", "rewards/margins", "rewards/accuracies"}


def test_supervised_counts_tokens_that_were_the_likeliest():
    groups = [EncodedGroup([1], ([2, 3],), None, 1), EncodedGroup([1], ([2],), None, 2)]
    found = values(Supervised(), groups, torch.tensor([[0.0, 0, 2], [0.0, 0, 0]]))
    assert found == {"mean_token_accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize("objective", [Dpo(), Kto(), Supervised()], ids=lambda o: o.type)
def test_measuring_waits_for_no_device(objective):
    groups = [*GROUPS, EncodedGroup([1], ([2], [3], [4]), (0.0, 0.0, 0.0), 3, ratings=(2.0, 1.0, 1.0))]
    found = torch.zeros(7, 3, device="meta")  # which has no values to wait for
    assert all(value.shape == () for value in compute_metrics(objective, Measures(groups, found)).values())
