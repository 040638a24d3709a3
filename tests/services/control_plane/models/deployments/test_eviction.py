"""Tests which models are loaded, which are unloaded, and what the others are told."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from services.control_plane.models.deployments.eviction import (
    LOADING_SECONDS,
    NO_ENGINES,
    STAY_SECONDS,
    TURN_SECONDS,
    Engines,
    Model,
    Room,
    decide,
    engines,
)

TWO = Room(places=2, wait_seconds=180)
BUSY = Model(app_name="busy", state="running", held=10, answers=True, answered=True)
IDLE = Model(app_name="idle", state="running", held=10, used=20, answered=True)
LOADING = Model(app_name="loading", state="loading", held=30, used=1)
WAITING = Model(app_name="waiting", state="waiting", asked=5, used=1)
REFERENCE = Model(app_name="reference", state="running", used=9999, is_reference=True)
PINNED = Model(app_name="pinned", state="running", used=9999, held=9999, answered=True, pinned=True)


def test_an_idle_model_leaves_its_place_to_another_and_a_busy_one_keeps_it() -> None:
    plan = decide([BUSY, IDLE, WAITING], TWO)
    assert (plan.serve, plan.forget, plan.waits) == ({"busy", "waiting"}, {"idle"}, {})


def test_the_idle_one_that_was_used_the_longest_time_ago_goes_first_and_one_that_failed_before_it() -> None:
    older = replace(IDLE, app_name="older", used=21)
    assert decide([IDLE, older, WAITING], TWO).forget == {"older"}
    failed = replace(IDLE, app_name="failed", state="failed", used=0, answered=False)
    assert decide([IDLE, failed, WAITING], TWO).forget == {"failed"}


def test_what_loads_or_answers_or_scores_is_not_evicted_and_the_others_are_told() -> None:
    for one in (LOADING, REFERENCE, PINNED, replace(IDLE, answered=False, held=STAY_SECONDS - 1)):
        plan = decide([BUSY, one, WAITING], TWO)
        assert plan.serve == {"busy", one.app_name}
        assert plan.waits == {
            "waiting": ("another model to be idle: 2 of at most 2 models are loaded, and all are loading or answering")
        }


def test_an_idle_model_stays_while_nobody_waits_or_as_long_as_the_settings_say() -> None:
    long_ago = replace(IDLE, used=1e6)
    assert decide([long_ago], TWO).serve == {"idle"}
    assert decide([replace(long_ago, idle_seconds=600), BUSY], TWO).serve == {"busy"}
    young, busy = replace(IDLE, used=599, idle_seconds=600), replace(BUSY, used=601, idle_seconds=600)
    assert decide([young, busy], TWO).forget == set()


def test_the_seconds_that_an_unused_model_has_left_end_when_it_is_evicted() -> None:
    fresh = replace(IDLE, answered=False, held=20, used=590, idle_seconds=600)
    scored = replace(IDLE, for_jobs=True)
    for one, left in ((replace(IDLE, used=100, idle_seconds=600), 500), (fresh, STAY_SECONDS - 20), (scored, 40)):
        assert one.seconds_left == left
        for after, is_evicted in ((left - 1, False), (left + 1, True)):
            later = replace(one, held=one.held + after, used=one.used + after)
            assert (one.app_name in decide([later], TWO).forget) is is_evicted
    for one in (IDLE, BUSY, LOADING, WAITING, REFERENCE, replace(PINNED, idle_seconds=600)):
        assert one.seconds_left is None


def test_a_model_that_only_jobs_requested_leaves_after_them_and_is_not_loaded_without_them() -> None:
    scored = replace(IDLE, for_jobs=True, used=STAY_SECONDS + 1)
    assert decide([scored], TWO).forget == {"idle"}
    assert decide([replace(scored, for_jobs=False)], TWO).serve == {"idle"}
    assert decide([replace(scored, used=STAY_SECONDS - 1)], TWO).serve == {"idle"}  # another job may come
    for kept in (replace(scored, is_reference=True), replace(scored, pinned=True), replace(scored, answers=True)):
        assert decide([kept], TWO).serve == {"idle"}
    waiting = replace(WAITING, for_jobs=True)
    assert decide([waiting], TWO).forget == {"waiting"}
    assert decide([replace(waiting, is_reference=True)], TWO).serve == {"waiting"}


def test_a_model_that_nobody_waits_for_any_more_is_forgotten_and_a_reference_is_not() -> None:
    left = replace(WAITING, used=181)
    assert decide([left], TWO).forget == {"waiting"}
    assert decide([replace(left, is_reference=True)], TWO).serve == {"waiting"}
    assert decide([replace(left, pinned=True)], TWO).serve == {"waiting"}
    assert decide([replace(LOADING, held=LOADING_SECONDS + 1, used=181), BUSY, WAITING], TWO).forget == {"loading"}


def test_references_come_first_and_are_never_evicted_for_one_another() -> None:
    held = [replace(REFERENCE, app_name=name) for name in "ab"]
    third = replace(WAITING, app_name="c", is_reference=True)
    plan = decide([*held, third, WAITING], TWO)
    assert plan.serve == {"a", "b"}
    assert plan.forget == set()
    assert plan.waits.keys() == {"c", "waiting"}
    assert decide([held[0], IDLE, third, replace(WAITING, asked=9999)], TWO).serve == {"a", "c"}


def test_those_that_wait_take_turns_by_when_they_were_first_asked_for() -> None:
    later = replace(WAITING, app_name="later", asked=4, used=0)
    plan = decide([BUSY, later, WAITING], TWO)
    assert plan.serve == {"busy", "waiting"}
    assert plan.waits.keys() == {"later"}


def test_one_that_just_got_its_place_is_not_evicted_for_the_next() -> None:
    first = replace(WAITING, app_name="first", asked=6, held=1e6)  # the cluster lost it
    assert decide([first, WAITING], replace(TWO, places=1)).serve == {"first"}


def test_a_model_that_is_always_busy_leaves_after_its_turn_if_another_waits() -> None:
    always, one = replace(BUSY, held=TURN_SECONDS + 1), replace(TWO, places=1)
    plan = decide([always, WAITING], one)
    assert plan.serve == {"busy"}  # until its requests are answered
    assert plan.waits["busy"] == "its next turn, because another model waits"
    assert decide([replace(always, answers=False), WAITING], one).serve == {"waiting"}
    assert decide([always], one).waits == {}


def test_an_idle_reference_leaves_the_gpu_to_the_workers_of_its_job_at_once() -> None:
    released = replace(REFERENCE, gpus=1, is_reference=False, answered=True)
    room = replace(TWO, gpus=0.0)
    assert decide([released], room).forget == {"reference"}
    assert decide([replace(released, is_reference=True)], room).serve == {"reference"}
    assert decide([replace(released, state="loading")], room).forget == {"reference"}
    busy = decide([replace(released, answers=True)], room)
    assert busy.waits == {"reference": "its next turn, because running jobs need the GPU that it used"}


def test_idle_models_leave_their_gpus_to_the_next_job_and_no_waiting_one_takes_them() -> None:
    idle, busy, waiting = (replace(model, gpus=1) for model in (IDLE, BUSY, WAITING))
    room = replace(TWO, gpus=2.0, gpus_of_next_job=2.0)
    plan = decide([idle, busy, waiting], room)
    assert plan.forget == {"idle"}
    assert plan.waits == {
        "waiting": ("GPUs: jobs leave 0 GPUs to models, 1 loaded models use some of them, and this model needs 1")
    }
    assert decide([replace(busy, held=TURN_SECONDS + 1)], room).waits.keys() == {"busy"}


def test_pinned_models_are_loaded_before_those_that_wait_and_leave_for_nobody() -> None:
    pinned = replace(WAITING, app_name="pinned", asked=1, used=9999, pinned=True)
    assert decide([BUSY, WAITING, pinned], TWO).serve == {"busy", "pinned"}
    always = replace(PINNED, answers=True, gpus=1)
    waiting = replace(WAITING, gpus=1)
    plan = decide([always, waiting], replace(TWO, gpus=1.0, gpus_of_next_job=1.0))
    assert plan.serve == {"pinned"}
    assert plan.waits == {
        "waiting": ("GPUs: jobs leave 0 GPUs to models, 1 loaded models use some of them, and this model needs 1")
    }
    assert decide([replace(always, idle_seconds=1)], TWO).serve == {"pinned"}


def test_models_hold_as_many_gpus_as_each_has_and_one_without_any_does_not_leave_for_them() -> None:
    large, small = replace(IDLE, app_name="large", gpus=3), replace(IDLE, app_name="small", used=99)
    room = replace(TWO, places=4, gpus=4.0)
    assert decide([large, small, replace(WAITING, gpus=2)], room).forget == {"large"}
    assert decide([large, small, replace(WAITING, gpus=1)], room).forget == set()
    plan = decide([replace(large, answers=True), small, replace(WAITING, gpus=2)], room)
    assert (plan.forget, plan.waits.keys()) == (set(), {"waiting"})
    assert decide([large, replace(WAITING, gpus=5)], room).forget == set()  # it would not fit


def test_a_model_that_waited_when_the_last_job_began_goes_before_the_next_one_if_it_fits_at_all() -> None:
    room, since = replace(TWO, places=4), {"capacity": 4.0, "since_last_job": 4.0}
    all_on_gpus = (replace(each, gpus=1) for each in (WAITING, BUSY, REFERENCE, IDLE, PINNED))
    waiting, busy, reference, idle, pinned = all_on_gpus
    assert engines([waiting, busy, reference, idle], 1, room, **since) == Engines(3.0, go_first=True)
    assert engines([replace(waiting, asked=3)], 0, room, **since) == NO_ENGINES
    assert engines([replace(waiting, used=181)], 0, room, **since) == NO_ENGINES
    assert engines([replace(waiting, gpus=8)], 0, room, **since) == NO_ENGINES
    assert engines([WAITING], 0, room, **since) == NO_ENGINES  # it needs none
    assert engines([waiting, busy], 0, replace(room, places=1), **since) == Engines(1.0)  # it waits for a place
    no_room = Engines(1.0, pinned=frozenset({"pinned"}), pinned_gpus=1.0)
    assert engines([replace(waiting, gpus=4), pinned], 0, room, **since) == no_room


models = st.builds(
    Model,
    app_name=st.uuids().map(str),
    state=st.sampled_from(["waiting", "loading", "running", "failed"]),
    held=st.sampled_from([0.0, 100.0, 400.0, 4000.0]),
    asked=st.floats(0, 1e4),
    used=st.floats(0, 1e4),
    gpus=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    is_reference=st.booleans(),
    pinned=st.booleans(),
    for_jobs=st.booleans(),
    idle_seconds=st.none() | st.just(60.0),
    answers=st.booleans(),
    answered=st.booleans(),
)
rooms = st.builds(
    Room,
    places=st.integers(1, 4),
    gpus=st.none() | st.floats(-2, 8),
    gpus_of_next_job=st.floats(0, 4),
    wait_seconds=st.just(180.0),
)


@given(st.lists(models, max_size=8), rooms)
def test_whatever_there_is_nobody_is_lost_and_nothing_that_works_is_evicted(found: list[Model], room: Room) -> None:
    plan = decide(found, room)
    names, placed = {model.app_name for model in found}, {model.app_name for model in found if model.state != "waiting"}
    assert plan.serve | plan.forget | plan.waits.keys() == names
    assert not plan.forget & (plan.serve | plan.waits.keys())
    assert all(plan.waits.values())
    assert placed & {model.app_name for model in found if not model.is_idle} <= plan.serve
    assert len(plan.serve) <= max(room.places, len(placed))
    assert not plan.forget & {model.app_name for model in found if model.stays}
