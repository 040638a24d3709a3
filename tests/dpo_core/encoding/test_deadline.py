import signal
import threading

import pytest

from dpo_core.encoding.deadline import deadline


def compute(seconds: float) -> None:
    with deadline(seconds, ValueError("too long")):
        while True:
            pass


def test_code_that_computes_for_too_long_is_stopped() -> None:
    with pytest.raises(ValueError, match="too long"):
        compute(0.05)


def test_the_former_signal_handler_is_restored() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with deadline(10, ValueError("too long")):
        pass
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert signal.getsignal(signal.SIGVTALRM) == before


def test_other_threads_are_not_limited() -> None:
    done = []

    def work() -> None:
        with deadline(0.01, ValueError("too long")):
            done.append(sum(range(10**6)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
