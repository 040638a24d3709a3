from dpo_core.objectives.drift import FALLEN, WINDOW, Drift


def warnings(logratios: list[float], margins: list[float]) -> list[str]:
    drift = Drift()
    steps = [{"logratios/chosen": h, "rewards/margins": m} for h, m in zip(logratios, margins, strict=True)]
    return [said for said in map(drift.warning, steps) if said]


def test_a_fall_of_chosen_completions_under_growing_margins_is_warned_of_once_with_figures():
    falling = [-0.5 * step for step in range(30)]
    (said,) = warnings(falling, [0.2 * step for step in range(30)])
    # The first ten steps fall by 2.25 nats on average, with margins of 0.9.
    assert "2.2 nats less likely" in said
    assert "grown to 0.90" in said
    assert "raise beta" in said


def test_nothing_is_warned_of_without_a_drift():
    assert not warnings([0.1 * step for step in range(30)], [0.2] * 30)
    assert not warnings([-5.0] * 30, [-0.2] * 30), "margins do not grow"
    assert not warnings([-5.0] * (WINDOW - 1), [0.2] * (WINDOW - 1)), "too few steps to tell"
    assert not warnings([-0.9 * FALLEN] * 30, [0.2] * 30), "less than the limit"


def test_objectives_without_a_reference_get_no_warning():
    assert Drift().warning({"rewards/margins": 1.0, "loss": 0.3}) is None
