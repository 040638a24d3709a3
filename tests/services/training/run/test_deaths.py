from ray.exceptions import OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError

from services.training.run.deaths import cause_of
from tests.services.test_deaths import MEMORY, OUT_OF_MEMORY


def test_a_killed_worker_is_the_cause_and_not_those_that_waited_for_it() -> None:
    errors = {0: RuntimeError("Connection closed by peer"), 1: OutOfMemoryError(OUT_OF_MEMORY), 2: ValueError("late")}
    assert cause_of(WorkerGroupError("Error on worker ranks 0, 1, 2: ...", errors)).startswith(MEMORY)
    assert cause_of(*errors.values()).startswith(MEMORY)


def test_what_a_controller_or_the_driver_itself_raised_is_the_cause() -> None:
    assert cause_of(ControllerError(TimeoutError("no workers"))) == "TimeoutError: no workers"
    assert cause_of(KeyError()) == "KeyError"
