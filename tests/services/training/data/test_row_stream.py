"""Tests that training begins with the first rows of a file while the other rows are still encoded.

The file has 24 rows. Each row is a piece, so that there are three windows of eight pieces.
"""

import asyncio
import json
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dpo_core.config import Optim, TrainConfig
from dpo_core.options import Orpo
from services.contract import CheckpointSaved, Failed, Message, Progress, Started, StepMetrics
from services.training.data.dataset import Part
from services.training.data.encoding import Encoded, Piece
from services.training.data.file_report import EncodingReport
from services.training.data.row_stream import Arrivals, stream_encoder
from services.training.reports.reporting import JobFailed, invalid_file
from tests.services.training.attempt import Driver, figures, only, train_workers
from tests.services.training.gated_driver import LATE, NUM_ROWS

GATED = "tests.services.training.gated_driver"
CONFIG = TrainConfig(objective=Orpo(), batch_size=4, n_epochs=2, checkpoint_steps=2, optim=Optim(learning_rate=1e-3))


def part(number: int, num_groups: int = 1) -> Part:
    return Part(name=f"{number}", num_rows=1, num_groups=num_groups, num_tokens=1, sha256="")


# --- without a cluster -------------------------------------------------------------------------------


def pieces(count: int) -> list[Piece]:
    return [Piece(number=n, first_line=n + 1, num_rows=1, start=n, size=1) for n in range(count)]


def encode_all(given: Sequence[Piece], *, beside: int = 0) -> Iterator[Encoded]:
    return (Encoded(piece=piece.number, report=EncodingReport(), training=part(piece.number)) for piece in given)


def never(stream: object) -> None:
    raise AssertionError("nothing to begin with")


def test_one_window_is_encoded_whole_before_training(make_spec: Any) -> None:
    found = list(stream_encoder(make_spec(), "", encode_all, never, never)(pieces(8)))
    assert sorted(result.piece for result in found) == list(range(8))


def test_a_first_window_of_which_nothing_is_left_begins_nothing(make_spec: Any) -> None:
    def encode(given: Sequence[Piece], *, beside: int = 0) -> Iterator[Encoded]:
        assert not beside
        return (
            result.model_copy(update={"training": part(result.piece, num_groups=0)}) for result in encode_all(given)
        )

    assert len(list(stream_encoder(make_spec(), "", encode, never, never)(pieces(20)))) == 20


def test_a_line_of_the_first_window_that_cannot_be_used_begins_nothing(make_spec: Any) -> None:
    def encode(given: Sequence[Piece], *, beside: int = 0) -> Iterator[Encoded]:
        for result in encode_all(given):
            failed = (result.piece + 1, invalid_file(f"Line {result.piece + 1} is broken."))
            yield result.model_copy(update={"training": None, "refused": failed})

    with pytest.raises(JobFailed, match=r"Line \d+ is broken"):
        list(stream_encoder(make_spec(), "", encode, never, never)(pieces(20)))


def test_who_takes_parts_waits_until_all_of_them_are_there() -> None:
    async def scenario() -> None:
        arrivals = Arrivals({0: part(0)})
        assert await arrivals.take([0]) == [part(0)]
        waiting = [asyncio.create_task(arrivals.take([2, 1])) for _ in range(3)]
        held_out = asyncio.create_task(arrivals.held_out())
        await arrivals.add(1, part(1))
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await arrivals.add(2, part(2))
        assert [await task for task in waiting] == [[part(2), part(1)]] * 3
        assert not held_out.done()
        await arrivals.finish(None)
        assert await held_out is None

    asyncio.run(scenario())


# --- whole attempts ----------------------------------------------------------------------------------


def rows(make_pair: Any) -> list[str]:
    """Returns 24 pairs as lines of JSON, of which two are too long."""
    pairs = [make_pair(number) for number in range(NUM_ROWS)]
    for number in (3, 20):
        pairs[number]["preferred_output"][0]["content"] = "x" * 128
    return [json.dumps(pair) + "\n" for pair in pairs]


@pytest.fixture
def stage(
    make_spec: Any, make_pair: Any, ray_environment: dict[str, str], control_plane: Any, tmp_path: Path
) -> Iterator[Callable[..., Driver]]:
    """Returns a function that starts an attempt on a file in `tmp_path`."""
    drivers: list[Driver] = []
    (tmp_path / "rows.jsonl").write_text("".join(rows(make_pair)))

    def start(program: str = GATED, **fields: Any) -> Driver:
        given = {"config": CONFIG, "training_uri": str(tmp_path / "rows.jsonl"), "events_url": control_plane.url}
        drivers.append(Driver(make_spec(**given | fields), ray_environment, control_plane.token, program))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.process.kill()
        driver.process.wait()


@pytest.mark.ray
def test_training_begins_before_all_is_encoded_and_is_the_same_run_however_often_it_dies(
    stage: Callable[..., Driver], ray_environment: dict[str, str], tmp_path: Path
) -> None:
    first = stage()
    first.reported(CheckpointSaved)
    reports, sentence = (
        first.reports(),
        (f"Training begins with 8 of {NUM_ROWS} rows, while the other rows are still being turned into tokens."),
    )
    assert reports.index(Message(message=sentence)) < reports.index(only(Started, reports)[0])
    assert max(progress.done for progress in only(Progress, reports)) <= NUM_ROWS - len(LATE)

    train_workers(ray_environment)[0].kill()
    first.reported(Started, count=2)
    first.process.send_signal(signal.SIGKILL)
    first.wait()
    (tmp_path / "gate").touch()
    second = stage(attempt=2)
    assert second.wait() == 0, second.log.read_text()[-5000:]
    assert all(started.resumed_from for started in only(Started, first.reports())[1:] + only(Started, second.reports()))
    assert_same_from_cache(stage, tmp_path, [first, second])


@pytest.mark.ray
def test_a_checkpoint_is_evaluated_on_all_that_is_held_out_when_all_is_encoded(
    stage: Callable[..., Driver], tmp_path: Path
) -> None:
    driver = stage(validation_share=0.2)
    driver.reported(StepMetrics)
    (tmp_path / "gate").touch()
    assert driver.wait() == 0, driver.log.read_text()[-5000:]
    assert all("eval/loss" in saved.metrics for saved in only(CheckpointSaved, driver.reports()))
    assert_same_from_cache(stage, tmp_path, [driver])


def assert_same_from_cache(stage: Callable[..., Driver], tmp_path: Path, attempts: list[Driver]) -> None:
    """Runs another job on the same data, which are prepared already, and asserts that its metrics are those of
    `attempts`."""
    spec = attempts[0].spec
    again = {"job_id": "ftjob-2", "run_uri": str(tmp_path / "again"), "validation_share": spec.validation_share}
    cached = stage("services.training.driver", **again)
    assert cached.wait() == 0, cached.log.read_text()[-5000:]
    messages = [report.message for report in only(Message, cached.reports())]
    assert messages[0] == "Training file: the token ids are known from an earlier job with the same data and model."
    whole = figures(cached.reports())
    found = [figures(attempt.reports()) for attempt in attempts]
    assert {step for steps in found for step in steps} == set(whole)
    assert all(steps[step] == whole[step] for steps in found for step in steps)
    assert attempts[-1].reports()[-1].trained_tokens == cached.reports()[-1].trained_tokens


@pytest.mark.ray
def test_a_line_that_cannot_be_used_ends_training_that_has_begun_with_its_number(
    stage: Callable[..., Driver], make_pair: Any, tmp_path: Path, control_plane: Any
) -> None:
    lines = rows(make_pair)
    lines[LATE[0]] = '{"neither": 1}\n'
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    driver = stage(num_workers=2)
    driver.reported(StepMetrics)
    (tmp_path / "gate").touch()
    assert driver.wait() == 1, driver.log.read_text()[-5000:]
    last = driver.reports()[-1]
    assert isinstance(last, Failed)
    assert (last.code, last.param) == ("invalid_training_file", "training_file")
    assert f"Line {LATE[0] + 1}" in last.message
    assert control_plane.reports()[-1] == last


@pytest.mark.ray
def test_training_that_fails_ends_the_encoding_that_goes_on(
    stage: Callable[..., Driver], model_source: str, tmp_path: Path
) -> None:
    broken = shutil.copytree(model_source, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38  # its outputs are no numbers
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    driver = stage(model_source=str(broken))
    assert driver.wait() == 1, driver.log.read_text()[-5000:]
    last = driver.reports()[-1]
    assert isinstance(last, Failed)
    assert last.code == "training_diverged"
    assert max(progress.done for progress in only(Progress, driver.reports())) <= NUM_ROWS - len(LATE)
